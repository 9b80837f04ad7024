"""Whatever bytes a client sends, the answer is its own fault or an answer, and the log is quiet."""

from __future__ import annotations

import contextlib
import gc
import json
import time
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specprefill.core.errors import InvalidRequest
from specprefill.gateway.openai.request_json import MAX_DEPTH, JsonLimits, parse_json
from specprefill.gateway.openai.routes import GENERATING, SERVED
from tests.contract.conftest import JSON_LIMITS
from tests.linear_cost import assert_linear

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quiet"),
]

JSON = {"content-type": "application/json"}
DEEP = 20_000
POSTS = [
    *sorted(GENERATING),
    "/v1/messages/count_tokens",
    "/v1/selections",
    "/tokenize",
    "/detokenize",
]
PRIVATE = {
    "specprefill_positions": {"runs": [0, 1], "prompt_tokens": 9},
    "specprefill_replay": [3],
    "kv_transfer_params": {"do_remote_prefill": True},
    "ec_transfer_params": {"x": 1},
    "position_ids": [1],
    "replay": [3],
}


# --- JSON -------------------------------------------------------------------------------------

NO_JSON = {
    "empty": b"",
    "cut": b'{"model": "demo", "messages": [',
    "nested lists": b"[" * DEEP,
    "nested lists, closed": b'{"messages": ' + b"[" * DEEP + b"]" * DEEP + b"}",
    "nested objects": b'{"a":' * (DEEP // 2) + b"1" + b"}" * (DEEP // 2),
    "just too deep": b'{"messages": ' + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"}",
    "not UTF-8": b'{"model": "\xff\xfe"}',
    "half a surrogate pair": b'{"model": "\\ud800"}',
    "NaN": b'{"model": "demo", "temperature": NaN}',
    "infinity": b'{"model": "demo", "temperature": 1e999}',
    "5,000 digits": b'{"model": "demo", "max_tokens": ' + b"1" * 5000 + b"}",
    "a byte order mark": b"\xef\xbb\xbf{}",
    "no object": b"[1, 2]",
    "a number": b"7",
    "null": b"null",
    "a NUL": b"\x00",
}


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("body", NO_JSON.values(), ids=NO_JSON.keys())
async def test_a_body_that_is_no_request_is_400(
    http: httpx.AsyncClient, pipeline: Any, path: str, body: bytes
) -> None:
    answer = await http.post(path, content=body, headers=JSON)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["message"]
    assert len(answer.content) < 5000
    assert pipeline.requests == []


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/x"])
async def test_a_body_of_another_type_reaches_no_engine(
    http: httpx.AsyncClient, pipeline: Any, kind: str
) -> None:
    body = json.dumps({"model": "demo", "prompt": "a", "specprefill": {"keep": 7}}).encode()
    answer = await http.post("/v1/completions", content=body, headers={"content-type": kind})
    assert 400 <= answer.status_code < 500
    assert pipeline.requests == []


@pytest.mark.parametrize(
    "kind", [None, "application/json; charset=utf-8", "application/vnd.x+json"]
)
async def test_our_field_is_read_whatever_json_is_called(
    http: httpx.AsyncClient, pipeline: Any, kind: str | None
) -> None:
    body = json.dumps({"model": "demo", "prompt": "a", "specprefill": {"keep": 7}}).encode()
    request = http.build_request("POST", "/v1/completions", content=body)
    if kind is not None:
        request.headers["content-type"] = kind
    answer = await http.send(request)
    assert 400 <= answer.status_code < 500
    assert pipeline.requests == []


VALUES = [
    -1, 0, 2**31, 2**63, 2**64, 10**30, -(10**30), 1e308, -1e308, 0.5, True, None, "", "x", "1",
    [], {}, [None], [[]], ["a", 1], {"a": None}, "\u0000", "\n", "x" * 1000, [-1], [2**40],
]  # fmt: skip
FIELDS = [
    "model", "max_tokens", "max_completion_tokens", "max_output_tokens", "min_tokens",
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "stop", "stop_token_ids", "logprobs",
    "top_logprobs",
    "prompt_logprobs", "logit_bias", "presence_penalty", "repetition_penalty", "priority",
    "truncate_prompt_tokens", "response_format", "structured_outputs", "tools", "tool_choice",
    "stream", "stream_options", "messages", "prompt", "input", "system", "instructions", "user",
    "request_id", "cache_salt", "echo", "suffix", "bad_words", "allowed_token_ids", "vllm_xargs",
    "kv_transfer_params", "specprefill", "speculative_prefill", "specprefill_keep_pct", "best_of",
    "use_beam_search", "chat_template", "chat_template_kwargs", "documents", "metadata",
    "reasoning",
    "reasoning_effort", "thinking_token_budget", "skip_special_tokens", "add_special_tokens",
]  # fmt: skip
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/completions": {"prompt": "hello"},
    "/v1/responses": {"input": "hello"},
    "/v1/messages": {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3},
}


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("field", FIELDS)
async def test_an_odd_value_is_an_answer_or_the_callers_fault(
    http: httpx.AsyncClient, path: str, field: str
) -> None:
    for value in VALUES:
        body = {"model": "demo", **BODIES[path], field: value}
        answer = await http.post(path, content=json.dumps(body).encode(), headers=JSON)
        assert answer.status_code < 500 or answer.status_code == 501, (value, answer.text)
        assert "Traceback" not in answer.text


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(sorted(BODIES)),
    more=st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3),
)
async def test_odd_values_together_are_too(
    http: httpx.AsyncClient, path: str, more: dict[str, Any]
) -> None:
    body = json.dumps({"model": "demo", **BODIES[path], **more}).encode()
    answer = await http.post(path, content=body, headers=JSON)
    assert answer.status_code < 500 or answer.status_code == 501, answer.text


@given(st.binary(max_size=60))
def test_bytes_are_a_value_or_refused(source: bytes) -> None:
    with contextlib.suppress(InvalidRequest):
        parse_json(source, JSON_LIMITS, "it")


@given(json_values)
def test_what_is_json_is_read(value: Any) -> None:
    assert parse_json(msgspec.json.encode(value), JSON_LIMITS, "it") == value


# --- sizes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}] * 2001}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": [{"a": 1}] * 2001}]}),
        ("/v1/completions", {"prompt": ["a"] * 2001}),
        ("/v1/completions", {"prompt": [[1]] * 2001}),
        ("/v1/responses", {"input": [{"role": "user", "content": "a"}] * 2001}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}] * 2001}),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}] * 2001}),
    ],
)
async def test_a_request_of_very_many_parts_is_refused_at_once(
    http: httpx.AsyncClient, pipeline: Any, path: str, fields: dict[str, Any]
) -> None:
    body = json.dumps({"model": "demo", "max_tokens": 1, **fields}).encode()
    taken_s = []
    gc.collect()
    gc.disable()  # it would walk everything that other tests left in memory
    try:
        for _ in range(3):
            started_s = time.thread_time()
            answer = await http.post(path, content=body, headers=JSON)
            taken_s.append(time.thread_time() - started_s)
    finally:
        gc.enable()
    assert min(taken_s) < 0.2  # it takes 3 ms
    assert answer.status_code == 400
    assert "2000" in answer.json()["error"]["message"]
    assert pipeline.requests == []


@pytest.mark.parametrize("bad", [{}, {"role": "user", "content": 3}, "text", 5])
async def test_a_long_input_ends_at_its_first_bad_item(
    http: httpx.AsyncClient, pipeline: Any, bad: Any
) -> None:
    good = {"role": "user", "content": "a"}
    started_s = time.thread_time()
    answer = await http.post("/v1/responses", json={"input": [good] * 40 + [bad] * 1500})
    assert time.thread_time() - started_s < 1.0
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[40]")
    assert (await http.post("/v1/responses", json={"input": [good] * 40})).status_code == 200


async def test_token_ids_are_no_parts(http: httpx.AsyncClient, pipeline: Any) -> None:
    body = {"model": "demo", "prompt": [[20] * 1900] * 2, "max_tokens": 1}
    assert (await http.post("/v1/completions", json=body)).status_code == 200


def test_checking_a_body_costs_one_walk() -> None:
    def make(size: int) -> Any:
        bodies = [[{"a": [1, {"b": "c"}]}] * size, [1] * size * 20, [[1]] * size]
        sources = [msgspec.json.encode(body) for body in bodies]
        limits = JsonLimits(items=10**9)
        return lambda: [parse_json(source, limits, "it") for source in sources]

    assert_linear(make, 10_000)


@pytest.mark.parametrize(
    "value", ["a\nb", "x" * 257, "\u2028", "\x1b[31m", "\u65e5\u672c", "caf\u00e9"]
)
async def test_an_id_that_would_break_a_log_line_or_a_header_is_refused(
    http: httpx.AsyncClient, pipeline: Any, value: str
) -> None:
    body = {"model": "demo", "prompt": "a", "request_id": value}
    answer = await http.post("/v1/completions", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "request_id")
    assert pipeline.requests == []


async def test_an_id_is_one_word_in_logs(http: httpx.AsyncClient, pipeline: Any) -> None:
    headers = {"x-request-id": "a outcome=finished"}
    answer = await http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert answer.headers["x-request-id"] == "a outcome=finished"
    assert " " not in pipeline.requests[0].request_id
    for refused in ("x" * 300, "caf\u00e9".encode("latin-1"), "\u65e5\u672c".encode()):
        headers = {"x-request-id": refused}
        answer = await http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-request-id")


# --- routes -----------------------------------------------------------------------------------


async def test_only_known_routes_are_served(http: httpx.AsyncClient, gateway: Any) -> None:
    assert {route.path for route in gateway[1].routes} <= SERVED
    for path in ("/invocations", "/v1/chat/completions/batch", "/generative_scoring"):
        body = {"messages": [[{"role": "user", "content": "a"}]], "specprefill": {"keep": 2}}
        assert (await http.post(path, json=body)).status_code == 404


async def test_no_route_accepts_what_only_the_service_sends_to_engines(
    http: httpx.AsyncClient, gateway: Any, pipeline: Any
) -> None:
    """Every route, known or not, with every private field in every place that holds more fields."""
    plain = {key: [1] for key in PRIVATE}  # vLLM takes no objects here
    more = {"extra_args": PRIVATE, "vllm_xargs": {"mine": "1", **plain}, "extra_body": PRIVATE}
    body = {
        "model": "demo", "prompt": "hello", "input": "hello", "max_tokens": 3, "tokens": [5],
        "messages": [{"role": "user", "content": "hello", **PRIVATE}],
        "sampling_params": {**PRIVATE, **more}, "metadata": {"a": "b"}, **PRIVATE, **more,
    }  # fmt: skip
    asked = 0
    for route in gateway[1].routes:
        if "POST" not in (getattr(route, "methods", None) or ()):
            continue
        path = route.path.replace("{response_id}", "resp_1")
        for left_out in ("", "messages", "prompt", "input"):
            fields = {name: value for name, value in body.items() if name != left_out}
            answer = await http.post(path, json=fields)
            asked += 1
            assert answer.status_code < 500, (path, answer.text)
    assert asked >= 4 * len(POSTS)
    assert len(pipeline.requests) >= len(GENERATING)
    for request in pipeline.requests:
        sent = msgspec.msgpack.decode(request.sampling)
        given = sent.get("extra_args") or {}
        assert [key for key in given if key.startswith("specprefill") or "transfer" in key] == []
        assert not PRIVATE.keys() & sent.keys()
    assert any(
        "mine" in (msgspec.msgpack.decode(each.sampling).get("extra_args") or {})
        for each in pipeline.requests
    )


@pytest.mark.parametrize("path", sorted(GENERATING))
async def test_beam_search_is_refused_everywhere(
    http: httpx.AsyncClient, pipeline: Any, path: str
) -> None:
    answer = await http.post(path, json={"model": "demo", **BODIES[path], "use_beam_search": True})
    assert answer.status_code == 400
    assert "use_beam_search" in answer.json()["error"]["message"]
    assert pipeline.requests == []
