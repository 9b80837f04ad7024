"""Limits of what a request asks for, and what counts for them is the prompt as it was sent."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import grpc
import httpx
import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from specprefill.core.errors import InvalidRequest
from specprefill.core.types import Controls
from specprefill.gateway.openai import sampling_limits
from specprefill.gateway.openai.context import RequestContext
from specprefill.rpc import specprefill_pb2 as pb
from tests.contract.conftest import CHAT
from tests.contract.gateway.test_gateway_grpc import KEY, channel, failure, stub

__all__ = ["channel", "stub"]  # the fixtures

MODEL_LEN = 2048
PROMPT = "The password of the vault is swordfish. " + "Nothing to see here. " * 60


def sampling(pipeline: Any) -> dict[str, Any]:
    return msgspec.msgpack.decode(pipeline.requests[-1].sampling)


def marked(gateway: Any, request: Any) -> list[str]:
    tokenizer = gateway[0].renderer.tokenizer
    return [tokenizer.decode(request.prompt[s.start : s.stop]) for s in request.protected]


# --- positions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "given"),
    [(5, 5), (150, 48), (None, 48), (2**32 - 1, 48)],
)
async def test_a_grpc_answer_ends_at_the_models_last_position(
    stub: Any, pipeline: Any, asked: int | None, given: int
) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[20] * (MODEL_LEN - 48)),
        sampling=pb.Sampling(max_tokens=asked, ignore_eos=True),
        prune=pb.Prune(keep=0.2),
    )
    await stub.Generate(request, metadata=KEY)
    assert sampling(pipeline)["max_tokens"] == given


async def test_min_tokens_end_there_too(stub: Any, pipeline: Any) -> None:
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=[20] * (MODEL_LEN - 48)),
        sampling=pb.Sampling(max_tokens=150, min_tokens=100),
    )
    await stub.Generate(request, metadata=KEY)
    assert (sampling(pipeline)["min_tokens"], sampling(pipeline)["max_tokens"]) == (48, 48)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
async def test_so_does_an_http_answer(http: httpx.AsyncClient, pipeline: Any, path: str) -> None:
    text = "one " * 900
    body = {
        "/v1/completions": {"prompt": text, "max_tokens": 2000},
        "/v1/chat/completions": {
            "messages": [{"role": "user", "content": text}], "max_tokens": 2000,
        },
        "/v1/responses": {"input": text, "max_output_tokens": 2000},
    }[path]  # fmt: skip
    answer = await http.post(path, json={"model": "demo", "specprefill": {"keep": 0.2}, **body})
    assert answer.status_code == 200, answer.text
    prompt_tokens = len(pipeline.requests[-1].prompt)
    assert sampling(pipeline)["max_tokens"] == MODEL_LEN - prompt_tokens


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "field", "given"),
    [
        ("/v1/chat/completions", {**CHAT, "n": 129}, "n", "1 * 129"),
        ("/v1/completions", {"prompt": "a", "n": 129}, "n", "1 * 129"),
        ("/v1/completions", {"prompt": [5] * 200, "n": 129}, "n", "1 * 129"),
        ("/v1/completions", {"prompt": ["a"] * 129}, "prompt", "129 * 1"),
        ("/v1/completions", {"prompt": [[5]] * 65, "n": 2}, "prompt", "65 * 2"),
    ],
)
async def test_a_request_for_more_answers_than_allowed_is_refused_before_it_is_read(
    http: httpx.AsyncClient,
    gateway: Any,
    pipeline: Any,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    body: dict[str, Any],
    field: str,
    given: str,
    *,
    stream: bool,
) -> None:
    for render in ("render_chat_async", "render_cmpl_async"):
        monkeypatch.setattr(gateway[0].renderer, render, None)
    answer = await http.post(path, json={**body, "temperature": 1.0, "stream": stream})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    allowed = "prompts times n must be at most 128 (gateway.max_samples)"
    assert error["message"] == f"{field}: {allowed}, not {given}"
    assert pipeline.requests == []


async def test_as_many_answers_as_allowed_are_given(http: httpx.AsyncClient, pipeline: Any) -> None:
    body = {"prompt": [[5]] * 64, "n": 2, "temperature": 1.0}
    answer = await http.post("/v1/completions", json=body)
    assert len(answer.json()["choices"]) == 128


async def test_more_answers_than_allowed_are_an_invalid_argument(stub: Any, pipeline: Any) -> None:
    request = pb.GenerateRequest(text="hello", sampling=pb.Sampling(n=129, temperature=1.0))
    refused = await failure(stub.Generate(request, metadata=KEY))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "at most 128 (gateway.max_samples), not 1 * 129" in refused.details()
    assert pipeline.requests == []


# --- lists of a request's sampling ------------------------------------------------------------

TOO_LONG = {
    "stop": (["x" * 1025], "1024 characters per string, not 1025"),
    # The model's own end of sequence is one of them.
    "stop_token_ids": (list(range(10, 138)), "128 with the model's own, not 129"),
    "bad_words": (["xyz " * 600], "1024 tokens in all"),
    "logit_bias": ({str(token): 1.0 for token in range(10, 1035)}, "1024 entries, not 1025"),
    "allowed_token_ids": (list(range(10, 1035)), "1024 entries, not 1025"),
}


@pytest.mark.parametrize("field", TOO_LONG)
async def test_a_list_that_would_hold_up_or_end_an_engine_is_refused(
    http: httpx.AsyncClient, pipeline: Any, field: str
) -> None:
    value, allowed = TOO_LONG[field]
    answer = await http.post("/v1/chat/completions", json={**CHAT, field: value})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert f"{field}: must hold at most {allowed}" in error["message"]
    assert pipeline.requests == []


@pytest.mark.parametrize(
    ("fields", "field", "allowed"),
    [
        ({"seed": 2**63 - 1, "n": 2}, "seed", "seed + n - 1"),
        (
            {"repetition_detection": {"max_pattern_size": 65, "min_count": 2}},
            "repetition_detection", "max_pattern_size must be at most 64, not 65",
        ),
        (
            {"repetition_detection": {"max_pattern_size": 64, "min_count": 5}},
            "repetition_detection", "times min_count must be at most 256, not 320",
        ),
    ],
)  # fmt: skip
async def test_a_number_that_would_hold_up_or_end_an_engine_is_refused(
    http: httpx.AsyncClient, pipeline: Any, fields: dict[str, Any], field: str, allowed: str
) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, field)
    assert allowed in error["message"]
    assert pipeline.requests == []


async def test_the_highest_numbers_are_sent_on(http: httpx.AsyncClient, pipeline: Any) -> None:
    repetition = {"max_pattern_size": 64, "min_count": 4}
    fields = {"seed": 2**63 - 2, "n": 2, "repetition_detection": repetition}
    answer = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 200
    assert sampling(pipeline)["seed"] == 2**63 - 2


async def test_over_grpc_too(stub: Any, pipeline: Any) -> None:
    asked = pb.Sampling(seed=2**63 - 1, n=2)
    refused = await failure(
        stub.Generate(pb.GenerateRequest(text="a", sampling=asked), metadata=KEY)
    )
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "seed + n - 1" in refused.details()
    assert pipeline.requests == []


LONG = "a" * 60_000  # the longest of the 2,048 tokens would make 28,672 characters


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {"prompt": LONG}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": LONG}]}, "messages"),
        ("/v1/completions", {"prompt": LONG, "truncate_prompt_tokens": 1}, "prompt"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": LONG}], "truncate_prompt_tokens": -1},
            "messages",
        ),
        ("/v1/responses", {"input": LONG, "truncation": "auto"}, "input"),
        (
            "/v1/messages/count_tokens",
            {"messages": [{"role": "user", "content": LONG}]},
            None,
        ),
    ],
)
async def test_text_that_vllm_would_tokenise_however_long_is_refused_at_once(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str | None
) -> None:
    started_s = time.thread_time()
    answer = await http.post(path, json={"model": "demo", **fields})
    assert answer.status_code == 400, answer.text[:300]
    error = answer.json()["error"]
    assert "characters (model.max_model_len tokens" in error["message"]
    assert param is None or error["param"] == param
    assert time.thread_time() - started_s < 1.0


async def test_text_within_the_limit_is_truncated_and_tokenised(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    fields = {"model": "demo", "prompt": "word " * 3000, "truncate_prompt_tokens": 9}
    answer = await http.post("/v1/completions", json={**fields, "max_tokens": 1})
    assert answer.status_code == 200, answer.text[:300]
    assert len(pipeline.requests[-1].prompt) == 9
    answer = await http.post("/tokenize", json={"model": "demo", "prompt": "word " * 3000})
    assert answer.status_code == 200
    assert answer.json()["count"] >= 3000


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        ({"stop": [f"word {place}" for place in range(65)]}, "stop: must hold at most 64 strings"),
        ({"stop": ["x" * 1025]}, "stop: must hold at most 1024 characters per string"),
        ({"stop_token_ids": range(10, 138)}, "stop_token_ids: must hold at most 128"),
    ],
)
async def test_such_a_list_is_an_invalid_argument(
    stub: Any, pipeline: Any, sampling: dict[str, Any], allowed: str
) -> None:
    request = pb.GenerateRequest(text="hello", sampling=pb.Sampling(**sampling))
    refused = await failure(stub.Generate(request, metadata=KEY))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert allowed in refused.details()
    assert pipeline.requests == []


async def test_lists_of_the_allowed_length_are_sent_on(stub: Any, pipeline: Any) -> None:
    stops = [f"{place:04}" * 256 for place in range(64)]
    asked = pb.Sampling(stop=stops, stop_token_ids=range(10, 137))
    await stub.Generate(pb.GenerateRequest(text="hello", sampling=asked), metadata=KEY)
    assert sampling(pipeline)["stop"] == stops
    assert len(sampling(pipeline)["stop_token_ids"]) == 127


def test_the_limits_are_the_sizes_of_vllms_tables() -> None:
    from vllm import envs
    from vllm.v1.worker.gpu.sample import logit_bias

    assert sampling_limits.MAX_STOP_TOKENS == logit_bias.MAX_NUM_STOP_TOKEN_IDS
    assert sampling_limits.MAX_BAD_WORD_TOKENS == envs.VLLM_MAX_BAD_WORDS_TOTAL_TOKENS
    assert sampling_limits.MAX_BIASES == logit_bias.MAX_NUM_LOGIT_BIAS_TOKENS
    assert sampling_limits.MAX_ALLOWED_TOKENS == logit_bias.MAX_NUM_ALLOWED_TOKEN_IDS


# --- protection -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["text", "ids"])
async def test_protect_works_on_text_and_on_token_ids(
    http: httpx.AsyncClient, gateway: Any, pipeline: Any, form: str
) -> None:
    ids = gateway[0].renderer.tokenizer.encode(PROMPT, add_special_tokens=False)
    body = {
        "model": "demo",
        "prompt": PROMPT if form == "text" else ids,
        "specprefill": {"enabled": True, "protect": ["vault is swordfish"]},
    }
    assert (await http.post("/v1/completions", json=body)).status_code == 200
    assert any("vault is swordfish" in text for text in marked(gateway, pipeline.requests[0]))


async def test_protect_works_on_token_ids_over_grpc(stub: Any, gateway: Any, pipeline: Any) -> None:
    ids = gateway[0].renderer.tokenizer.encode(PROMPT, add_special_tokens=False)
    request = pb.GenerateRequest(
        token_ids=pb.TokenIds(ids=ids),
        prune=pb.Prune(enabled=True, protect=["vault is swordfish"]),
    )
    await stub.Generate(request, metadata=KEY)
    assert any("vault is swordfish" in text for text in marked(gateway, pipeline.requests[0]))


async def test_a_truncated_prompt_is_protected_where_it_is_left(
    http: httpx.AsyncClient, gateway: Any, pipeline: Any
) -> None:
    body = {
        "messages": [
            {"role": "system", "content": "never mind"},
            {"role": "user", "content": PROMPT + "The answer is forty-two."},
        ],
        "truncate_prompt_tokens": 200,
        "specprefill": {"enabled": True, "protect": ["answer is forty"]},
    }
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert len(pipeline.requests[0].prompt) == 200
    assert any("answer is forty" in text for text in marked(gateway, pipeline.requests[0]))


@pytest.mark.parametrize("field", ["specprefill.protect", "prune.protect"])
async def test_what_the_template_changes_cannot_be_protected(
    gateway: Any, pipeline: Any, field: str
) -> None:
    client = gateway[0]
    prompt = await client.render_text(PROMPT.upper())  # as a template may do
    context = RequestContext(
        controls=Controls(prune=True, protect=("PASSWORD", "swordfish")),
        messages=[{"role": "user", "content": PROMPT}],
        controls_prefix=field.removesuffix("protect"),
    )
    with pytest.raises(InvalidRequest) as refused:
        await client.prepare(prompt, SamplingParams(), "r", context)
    assert refused.value.field == field
    assert "'swordfish'" in refused.value.message


async def test_a_search_ends_with_its_request(
    gateway: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    searching, ended = threading.Event(), threading.Event()

    def search(*_args: Any, is_cancelled: Any, **_more: Any) -> tuple[()]:
        searching.set()
        while not is_cancelled():  # as a long search does between two steps
            time.sleep(0.001)
        ended.set()
        return ()

    monkeypatch.setattr("specprefill.gateway.openai.marking.protected_spans", search)
    client = gateway[0]
    context = RequestContext(controls=Controls(prune=True, protect=("vault",)))
    prompt = await client.render_text(PROMPT)
    preparing = asyncio.create_task(client.prepare(prompt, SamplingParams(), "r", context))
    assert await asyncio.to_thread(searching.wait, 10)
    preparing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await preparing
    assert await asyncio.to_thread(ended.wait, 10)
