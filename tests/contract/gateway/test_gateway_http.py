"""The OpenAI-compatible API, end to end but for the pools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import openai
import pytest

from specprefill.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from specprefill.core.types import Controls, Plan, PlanKind, Reason, keep_all
from specprefill.gateway.pools.affinity import load_of
from tests.contract.conftest import CHAT, TEXT, chat, sampling

# vLLM reads its own deprecated field.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

LONG = " ".join(["the quick brown fox jumps over the lazy dog"] * 12)
KEY = {"authorization": "Bearer test-key"}


async def test_a_chat_answer(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await chat(client, max_tokens=5, temperature=0)
    assert answer.choices[0].message.content == TEXT
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == len(pipeline.requests[0].prompt)
    assert answer.usage.completion_tokens == 3
    assert answer.usage.prompt_tokens_details.cached_tokens == 7
    assert (sampling(pipeline)["temperature"], sampling(pipeline)["max_tokens"]) == (0.0, 5)


async def test_the_report_is_in_the_answer(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await chat(client)
    assert answer.model_extra["specprefill"] == {
        "plan": "prune",
        "reason": "default",
        "prompt_tokens": len(pipeline.requests[0].prompt),
        "kept_tokens": len(pipeline.requests[0].prompt) // 2,
        "keep_rate": 0.5,
        "mode": "positions",
        "prefilled_by": "prefill",
        "carried_tokens": 0,
        "recomputed": False,
        "retries": 0,
        "queue_s": 0.0,
        "speculate_s": 0.125,
        "prefill_s": 0.25,
        "transfer_s": 0.5,
        "first_decode_s": 0.0625,
        "ttft_s": 1.0,
        "discarded_s": 0.0,
    }


async def test_a_streamed_chat_answer(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    stream = await chat(client, stream=True, stream_options={"include_usage": True})
    events = [event async for event in stream]
    text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
    assert text == TEXT
    reported = ["specprefill" in event.model_extra for event in events]
    assert reported == [False] * (len(events) - 2) + [True, True]  # last finish reason, then usage
    assert events[-2].choices[0].finish_reason == "stop"
    assert events[-1].usage.completion_tokens == 3
    assert pipeline.closed == 1


async def test_a_cache_salt_arrives_and_separates(
    client: openai.AsyncOpenAI, pipeline: Any
) -> None:
    long = [{"role": "user", "content": "word " * 400}]
    for salt in ("mine", "yours", "mine"):
        await chat(client, messages=long, extra_body={"cache_salt": salt})
    assert [request.cache_salt for request in pipeline.requests] == ["mine", "yours", "mine"]
    mine, yours, again = (set(request.digests) for request in pipeline.requests)
    assert mine == again
    assert mine.isdisjoint(yours)


async def test_a_prompt_cache_key_names_the_session(
    client: openai.AsyncOpenAI, pipeline: Any
) -> None:
    for key in ("talk-1", "talk-2", None):
        await chat(client, **({} if key is None else {"prompt_cache_key": key}))
    assert [request.session for request in pipeline.requests] == ["talk-1", "talk-2", None]
    selection = keep_all(len(pipeline.requests[0].prompt), Plan(PlanKind.DENSE, Reason.DISABLED))
    sessions = [load_of(request, selection).session for request in pipeline.requests]
    assert len({*sessions}) == 3
    assert sessions[2] is None


async def test_n_samples_and_their_report(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await chat(client, n=2, seed=3)
    assert [choice.message.content for choice in answer.choices] == [TEXT, TEXT]
    assert (pipeline.requests[0].samples, sampling(pipeline)["seed"]) == (2, 3)
    assert answer.usage.completion_tokens == 6


async def test_n_samples_streamed(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    texts, reported = ["", ""], []
    async for event in await chat(client, n=2, stream=True):
        choice = event.choices[0]
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason is not None:
            reported.append("specprefill" in event.model_extra)
    assert texts == [TEXT, TEXT]
    assert reported == [False, True]


async def test_log_probabilities(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await chat(client, logprobs=True, top_logprobs=2)
    first = answer.choices[0].logprobs.content[0]
    assert (first.token, first.logprob) == (" alpha", -0.25)
    assert [each.logprob for each in first.top_logprobs] == [-0.25, -1.5]
    assert sampling(pipeline)["logprobs"] == 2


async def test_stop_strings(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    pipeline.stop_reason = "###"
    answer = await chat(client, stop=["###", "\n"])
    assert answer.choices[0].model_extra["stop_reason"] == "###"
    assert pipeline.requests[0].hold_back_chars == 2
    await chat(client, stop=["###"], extra_body={"include_stop_str_in_output": True})
    assert pipeline.requests[1].hold_back_chars == 0
    await chat(client)
    assert pipeline.requests[2].hold_back_chars == 0


async def test_plain_completions_of_several_prompts(
    client: openai.AsyncOpenAI, pipeline: Any
) -> None:
    answer = await client.completions.create(model="demo", prompt=["one", "two three"])
    assert [choice.text for choice in answer.choices] == [TEXT, TEXT]
    reported = answer.model_extra["specprefill"]
    assert [each["prompt_tokens"] for each in reported] == [
        len(r.prompt) for r in pipeline.requests
    ]


async def test_a_streamed_completion(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    stream = await client.completions.create(model="demo", prompt=[5, 6, 7], stream=True)
    events = [event async for event in stream]
    assert "".join(event.choices[0].text for event in events) == TEXT
    assert "specprefill" in events[-1].model_extra
    assert pipeline.requests[0].prompt == (5, 6, 7)


async def test_a_response_of_the_responses_api(http: httpx.AsyncClient, pipeline: Any) -> None:
    body = {"model": "demo", "input": LONG, "instructions": "be brief", "specprefill": True}
    answer = await http.post("/v1/responses", json=body)
    assert answer.status_code == 200
    assert answer.json()["output"][0]["content"][0]["text"] == TEXT
    assert answer.json()["specprefill"]["plan"] == "prune"
    assert pipeline.requests[0].controls == Controls(prune=True)


async def test_controls_reach_the_pipeline(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    await chat(client, extra_body={"specprefill": {"keep": 0.5, "floor": 0.1}})
    assert pipeline.requests[0].controls == Controls(keep=0.5, floor=0.1)
    await chat(client, extra_body={"speculative_prefill": False})
    assert pipeline.requests[1].controls == Controls(prune=False)


async def test_what_must_survive_is_marked(
    client: openai.AsyncOpenAI, pipeline: Any, gateway: Any
) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": LONG}]
    await chat(client, messages=messages, extra_body={"specprefill": {"protect": ["lazy dog the"]}})
    request = pipeline.requests[0]
    tokenizer = gateway[0].renderer.tokenizer
    texts = [tokenizer.decode(request.prompt[s.start : s.stop]) for s in request.protected]
    assert texts[0] == "<|begin|><|system|>be brief<|end|><|user|>"
    assert texts[1:-1] == [" lazy dog the"] * 11
    assert texts[-1].endswith("dog<|end|><|assistant|>")


@pytest.mark.parametrize("content", ["hello", LONG])
async def test_nothing_is_marked_where_nothing_is_pruned(
    client: openai.AsyncOpenAI, pipeline: Any, content: str
) -> None:
    messages = [{"role": "user", "content": content}]
    await chat(client, messages=messages, extra_body={"specprefill": False})
    assert pipeline.requests[0].protected == ()


async def test_special_tokens_of_a_raw_prompt_are_marked(
    client: openai.AsyncOpenAI, pipeline: Any
) -> None:
    prompt = f"<|user|>{LONG}<|end|><|assistant|>"
    await client.completions.create(model="demo", prompt=prompt, extra_body={"specprefill": True})
    request = pipeline.requests[0]
    marked = [request.prompt[i] for s in request.protected for i in range(s.start, s.stop)]
    assert marked[-3:] == [4, 2, 5]  # <|user|>, <|end|>, <|assistant|>


async def test_only_the_service_talks_to_engines(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    private = {"specprefill_positions": [1], "specprefill_replay": [3], "mine": 1}
    transfer = {"do_remote_prefill": True}
    await chat(client, extra_body={"vllm_xargs": private, "kv_transfer_params": transfer})
    assert sampling(pipeline)["extra_args"] == {"mine": 1}


async def test_the_timeout_comes_from_the_header_up_to_the_limit(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    for header, expected in (("2.5", 2.25), ("900", 60.0)):
        headers = {"x-request-timeout-seconds": header}
        await http.post("/v1/chat/completions", json=CHAT, headers=headers)
        assert pipeline.requests[-1].timeout_s == pytest.approx(expected, abs=0.2)
    await http.post("/v1/chat/completions", json=CHAT)
    assert pipeline.requests[-1].timeout_s == pytest.approx(60.0, abs=0.2)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidRequest("n: no", "n"), 400, "invalid_value"),
        (DeadlineExceeded("too late"), 504, "deadline_exceeded"),
        (Overloaded("full", 4.0, "queue_full"), 429, "overloaded"),
        (Unavailable("gone"), 503, "unavailable"),
        (RuntimeError("secret internals"), 500, "internal_error"),
    ],
)
async def test_a_failure_before_the_first_token_is_a_status(
    http: httpx.AsyncClient, pipeline: Any, error: Exception, status: int, code: str, stream: bool
) -> None:
    pipeline.fails = error
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert "secret" not in answer.text
    assert answer.headers.get("retry-after") == {429: "4", 503: "1"}.get(status)
    shed = answer.headers.get("x-specprefill-shed-reason")
    assert shed == ("queue_full" if status == 429 else None)
    assert pipeline.closed == 1


async def test_requests_are_distinguished_by_their_credentials_alone(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    await http.post("/v1/chat/completions", json={**CHAT, "user": "somebody else"})
    await http.post("/v1/chat/completions", json=CHAT)
    keys = {request.key for request in pipeline.requests}
    assert len(keys) == 1
    assert "test-key" not in str(keys)


async def test_a_failure_in_a_stream_is_its_last_event(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    pipeline.fails, pipeline.fails_after = Unavailable("gone"), 1
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    events = [line for line in answer.text.split("\n") if line]
    assert answer.status_code == 200
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "unavailable"
    assert events[-1] == "data: [DONE]"


async def test_an_answer_that_breaks_off_is_a_failure(
    http: httpx.AsyncClient, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(request: Any) -> AsyncIterator[Any]:
        for chunk in ():
            yield chunk

    monkeypatch.setattr(pipeline, "generate", nothing)
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 503


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": "other"}, 404, "model"),
        ({"temperature": -1}, 400, "temperature"),
        ({"specprefill": {"keep": 2}}, 400, "specprefill.keep"),
        ({"specprefill": {"mode": "dense"}}, 400, "specprefill.mode"),
        ({"logprobs": True, "top_logprobs": 2000}, 400, None),
        ({"prompt_logprobs": 1, "specprefill": True}, 400, "prompt_logprobs"),
        ({"cache_salt": ""}, 400, None),
        ({"prompt_cache_key": ""}, 400, "prompt_cache_key"),
        ({"prompt_cache_key": 7}, 400, "prompt_cache_key"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, 400, None),
        ({"messages": [{"role": "user", "content": "long " * 4000}]}, 400, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_bad_request_is_refused(
    http: httpx.AsyncClient,
    pipeline: Any,
    fields: dict[str, Any],
    status: int,
    param: str | None,
    stream: bool,
) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream, **fields})
    assert answer.status_code == status
    assert param is None or answer.json()["error"]["param"] == param
    assert pipeline.requests == []


async def test_prompt_logprobs_ask_for_a_dense_plan(http: httpx.AsyncClient, pipeline: Any) -> None:
    await http.post("/v1/chat/completions", json={**CHAT, "prompt_logprobs": 1})
    assert pipeline.requests[0].prompt_logprobs is True


async def test_a_body_over_the_limit_is_refused(http: httpx.AsyncClient, pipeline: Any) -> None:
    answer = await http.post("/v1/completions", json={"model": "demo", "prompt": "x" * 100_000})
    assert (answer.status_code, pipeline.requests) == (413, [])


async def test_models_and_tokenize_are_served(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/models")).json()["data"][0]["id"] == "demo"
    tokens = (await http.post("/tokenize", json={"model": "demo", "prompt": "hello"})).json()
    assert tokens["count"] > 0


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_closes_the_pipeline(
    gateway: Any, pipeline: Any, stream: bool
) -> None:
    pipeline.pause_s = 30.0
    body = json.dumps({**CHAT, "stream": stream}).encode()
    gone = asyncio.Event()
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    sent: list[dict[str, Any]] = []
    headers = [(b"authorization", b"Bearer test-key"), (b"content-type", b"application/json")]
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": "/v1/chat/completions",
        "raw_path": b"/v1/chat/completions",
        "query_string": b"",
        "root_path": "",
        "headers": headers,
        "server": ("x", 80),
        "client": ("y", 1),
    }
    call = asyncio.create_task(gateway[1](scope, receive, send))
    async with asyncio.timeout(10):
        await pipeline.began.wait()
        assert pipeline.closed == 0
        gone.set()
        await pipeline.ended.wait()
        await call
    assert pipeline.closed == 1


async def test_a_cancelled_request_ends_its_handler():
    """Serve cancels the request's task; vLLM's handlers run in tasks that do not know of it."""
    from specprefill.gateway.openai.bodies import BodyReader
    from specprefill.gateway.openai.middleware import RequestMiddleware
    from specprefill.gateway.openai.request_json import JsonLimits

    started, ended = asyncio.Event(), asyncio.Event()

    async def handler():
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async def like_vllm(scope, receive, send):
        await receive()  # the body
        working = asyncio.create_task(handler())
        leaving = asyncio.create_task(receive())
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)

    bodies = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.Event().wait()

    async def send(message):
        pass

    reader = BodyReader(1 << 20, 5.0, 1 << 20, lambda _reason: None)
    app = RequestMiddleware(like_vllm, reader, JsonLimits(100))
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "headers": []}
    request = asyncio.create_task(app(scope, receive, send))
    await asyncio.wait_for(started.wait(), 5)
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert ended.is_set()
