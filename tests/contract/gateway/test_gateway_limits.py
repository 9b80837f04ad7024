"""Limits count the prompt as the caller sent it: positions, and protected text."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import Any

import httpx
import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from specprefill.core.errors import InvalidRequest
from specprefill.core.types import Controls
from specprefill.gateway.openai.context import RequestContext
from specprefill.rpc import specprefill_pb2 as pb
from tests.contract.gateway.test_gateway_grpc import KEY, channel, stub

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
