"""The gRPC API over a real server, end to end but for the pools."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import grpc
import msgspec
import pytest

from specprefill.core.errors import DeadlineExceeded, InvalidRequest, Overloaded, Unavailable
from specprefill.core.types import Controls
from specprefill.gateway.grpc.serving import add_SpecPrefillServicer_to_server
from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc import specprefill_pb2_grpc as stubs
from tests.contract.conftest import (
    JSON_LIMITS,
    KEYS,
    LIMIT,
    MAX_MESSAGE_BYTES,
    configuration,
)

TEXT = " alpha bravo charlie"
KEY = (("authorization", "Bearer test-key"),)


class Servicer(stubs.SpecPrefillServicer):
    """The API in a plain gRPC server. Serve reads the status from the context; this aborts."""

    def __init__(self, api: Any) -> None:
        self._api = api

    async def Generate(self, request: Any, context: Any) -> Any:
        return await self._unary(self._api.generate, request, context)

    async def Score(self, request: Any, context: Any) -> Any:
        return await self._unary(self._api.score, request, context)

    async def Health(self, request: Any, context: Any) -> Any:
        return await self._unary(self._api.health, request, context)

    async def GenerateStream(self, request: Any, context: Any) -> AsyncIterator[Any]:
        from specprefill.gateway.openai.failures import RpcFailed

        try:
            async for chunk in self._api.generate_stream(request, context):
                yield chunk
        except RpcFailed as failed:
            await context.abort(failed.code, failed.details)

    async def _unary(self, method: Any, request: Any, context: Any) -> Any:
        from specprefill.gateway.openai.failures import RpcFailed

        try:
            return await method(request, context)
        except RpcFailed as failed:
            await context.abort(failed.code, failed.details)


@pytest.fixture
async def channel(gateway: Any, pipeline: Any, health: Any) -> AsyncIterator[grpc.aio.Channel]:
    from specprefill.gateway.grpc.api import GrpcApi
    from specprefill.gateway.openai.server import build_explainer

    server = grpc.aio.server()
    api = GrpcApi(
        gateway[0],
        build_explainer(configuration(), gateway[0]),
        ("demo", "adapted"),
        KEYS,
        LIMIT,
        health,
        max_message_bytes=MAX_MESSAGE_BYTES,
        json_limits=JSON_LIMITS,
    )
    add_SpecPrefillServicer_to_server(Servicer(api), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as opened:
        yield opened
    await server.stop(grace=0)


@pytest.fixture
async def stub(channel: grpc.aio.Channel) -> Any:
    return stubs.SpecPrefillStub(channel)


def text_request(text: str = "hello", **fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text=text, **fields)


def sampling(pipeline: Any) -> dict[str, Any]:
    return msgspec.msgpack.decode(pipeline.requests[-1].sampling)


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as failed:
        await call
    return failed.value


async def test_an_answer_in_one_message(stub: Any, pipeline: Any) -> None:
    request = text_request(sampling=pb.Sampling(n=2, temperature=0.5, max_tokens=5))
    answer = await stub.Generate(request, metadata=KEY)
    assert [output.text for output in answer.outputs] == [TEXT, TEXT]
    assert [output.index for output in answer.outputs] == [0, 1]
    assert answer.outputs[0].finish_reason == "stop"
    assert list(answer.outputs[1].token_ids) == [310, 311, 312]
    assert answer.usage.prompt_tokens == len(pipeline.requests[0].prompt)
    assert (answer.usage.completion_tokens, answer.usage.cached_tokens) == (6, 7)
    assert (answer.report.decision.plan, answer.report.decision.reason) == ("prune", "default")
    assert answer.report.times.transfer_s == 0.5


async def test_an_answer_as_a_stream(stub: Any, pipeline: Any) -> None:
    chunks = [chunk async for chunk in stub.GenerateStream(text_request(), metadata=KEY)]
    assert "".join(chunk.output.text for chunk in chunks) == TEXT
    assert 2 <= len(chunks) <= 3  # steps that are ready together travel as one
    at_the_end = [False] * (len(chunks) - 1) + [True]
    assert [chunk.HasField("report") for chunk in chunks] == at_the_end
    assert [chunk.output.HasField("finish_reason") for chunk in chunks] == at_the_end
    assert chunks[-1].usage.completion_tokens == 3
    assert pipeline.closed == 1


async def test_a_conversation_goes_through_the_chat_template(
    stub: Any, pipeline: Any, gateway: Any
) -> None:
    tool = {"type": "function", "function": {"name": "lookup"}}
    conversation = pb.Conversation(
        messages=[
            pb.Message(role="system", content="be brief"),
            pb.Message(role="user", content="hello"),
        ],
        tools_json=json.dumps([tool]),
    )
    await stub.Generate(pb.GenerateRequest(conversation=conversation), metadata=KEY)
    text = gateway[0].renderer.tokenizer.decode(pipeline.requests[0].prompt)
    assert text.startswith("<|begin|><|system|>Tools: ")
    assert "lookup" in text
    assert text.endswith("<|system|>be brief<|end|><|user|>hello<|end|><|assistant|>")


async def test_what_must_survive_of_a_conversation_is_marked(
    stub: Any, pipeline: Any, gateway: Any
) -> None:
    conversation = pb.Conversation(
        messages=[
            pb.Message(role="system", content="be brief"),
            pb.Message(role="user", content="fox dog " * 60 + "why"),
        ]
    )
    request = pb.GenerateRequest(conversation=conversation, prune=pb.Prune(enabled=True))
    await stub.Generate(request, metadata=KEY)
    arrived, tokenizer = pipeline.requests[0], gateway[0].renderer.tokenizer
    head, tail = (arrived.prompt[span.start : span.stop] for span in arrived.protected)
    assert tokenizer.decode(head) == "<|begin|><|system|>be brief<|end|><|user|>"
    assert tokenizer.decode(tail).endswith("why<|end|><|assistant|>")
    assert len(tail) == 4 + 2  # tail_tokens, and the template's end


async def test_rates_in_the_wrong_order_are_named_as_the_message_does(stub: Any) -> None:
    for prune, detail in (
        (pb.Prune(keep=0.1, floor=0.5), "prune.floor (0.5) must not exceed prune.keep (0.1)"),
        (pb.Prune(keep=0.1, auto=True), "prune.keep"),
    ):
        refused = await failure(stub.Generate(text_request(prune=prune), metadata=KEY))
        assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert detail in refused.details()
        assert "specprefill." not in refused.details()


async def test_token_ids_are_used_as_they_are(stub: Any, pipeline: Any) -> None:
    request = pb.GenerateRequest(token_ids=pb.TokenIds(ids=[5, 6, 7]))
    await stub.Generate(request, metadata=KEY)
    assert pipeline.requests[0].prompt == (5, 6, 7)


async def test_every_sampling_field_arrives(stub: Any, pipeline: Any) -> None:
    fields = {
        "max_tokens": 9,
        "min_tokens": 2,
        "temperature": 0.5,
        "top_p": 0.75,
        "top_k": 11,
        "min_p": 0.125,
        "seed": 0,
        "n": 2,
        "presence_penalty": 0.25,
        "frequency_penalty": -0.25,
        "repetition_penalty": 1.25,
        "logprobs": 1,
        "ignore_eos": True,
        "stop": ["###"],
        "stop_token_ids": [9],
    }
    await stub.Generate(text_request(sampling=pb.Sampling(**fields)), metadata=KEY)
    assert {name: sampling(pipeline)[name] for name in fields} == fields
    assert pipeline.requests[0].hold_back_chars == 2


async def test_absent_sampling_fields_take_the_models_defaults(stub: Any, pipeline: Any) -> None:
    await stub.Generate(text_request(), metadata=KEY)
    assert sampling(pipeline)["max_tokens"] == 2048 - len(pipeline.requests[0].prompt)
    assert isinstance(sampling(pipeline)["seed"], int)  # drawn here: two engines use it


async def test_greedy_sampling_needs_no_seed(stub: Any, pipeline: Any) -> None:
    await stub.Generate(text_request(sampling=pb.Sampling(temperature=0.0)), metadata=KEY)
    assert "seed" not in sampling(pipeline)


async def test_a_json_schema_and_a_regex_constrain(stub: Any, pipeline: Any) -> None:
    schema = json.dumps({"type": "object", "properties": {"a": {"type": "integer"}}})
    request = text_request(sampling=pb.Sampling(json_schema=schema))
    await stub.Generate(request, metadata=KEY)
    assert sampling(pipeline)["structured_outputs"]["json"] == schema
    await stub.Generate(text_request(sampling=pb.Sampling(regex="a+")), metadata=KEY)
    assert sampling(pipeline)["structured_outputs"]["regex"] == "a+"


async def test_log_probabilities(stub: Any, pipeline: Any) -> None:
    request = text_request(sampling=pb.Sampling(logprobs=2))
    answer = await stub.Generate(request, metadata=KEY)
    first = answer.outputs[0].logprobs[0].candidates
    assert [(each.text, each.logprob) for each in first] == [(" alpha", -0.25), (" other", -1.5)]


async def test_controls_timeout_and_priority_arrive(stub: Any, pipeline: Any) -> None:
    prune = pb.Prune(enabled=True, keep=0.5, floor=0.25, protect=["a"])
    request = text_request(prune=prune, timeout_s=2.5, priority=-3)
    await stub.Generate(request, metadata=KEY)
    arrived = pipeline.requests[0]
    assert arrived.controls == Controls(True, 0.5, 0.25, ("a",))
    assert (arrived.timeout_s, arrived.priority) == (2.5, -3)
    await stub.Generate(text_request(timeout_s=900), metadata=KEY)
    assert pipeline.requests[1].timeout_s == 60.0


async def test_a_cache_salt_arrives(stub: Any, pipeline: Any) -> None:
    for salt in ("mine", None):
        await stub.Generate(text_request(cache_salt=salt), metadata=KEY)
    assert [request.cache_salt for request in pipeline.requests] == ["mine", None]
    refused = await failure(stub.Generate(text_request(cache_salt=""), metadata=KEY))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "cache_salt" in refused.details()


async def test_a_score_takes_a_cache_salt(stub: Any, pipeline: Any) -> None:
    for salt in ("mine", None):
        await stub.Score(pb.ScoreRequest(text="one two three", cache_salt=salt), metadata=KEY)
    assert [request.cache_salt for request in pipeline.requests] == ["mine", None]


async def test_a_prompt_cache_key_names_the_session(stub: Any, pipeline: Any) -> None:
    for key in ("talk", None):
        await stub.Generate(text_request(prompt_cache_key=key), metadata=KEY)
    assert [request.session for request in pipeline.requests] == ["talk", None]
    refused = await failure(stub.Generate(text_request(prompt_cache_key=""), metadata=KEY))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "prompt_cache_key" in refused.details()


async def test_score_returns_what_would_be_kept(stub: Any, pipeline: Any) -> None:
    answer = await stub.Score(pb.ScoreRequest(text="one two three"), metadata=KEY)
    assert [(run.start, run.stop) for run in answer.kept] == [(0, 2), (4, 5)]
    assert (answer.decision.kept_tokens, answer.decision.reason) == (3, "asked")
    assert (answer.queue_s, answer.speculate_s) == (0.25, 0.5)
    assert pipeline.requests[-1].wants_scores  # else a conversation would carry it over


async def test_score_explains_itself_where_asked(stub: Any, pipeline: Any) -> None:
    plain = await stub.Score(pb.ScoreRequest(text="one two three"), metadata=KEY)
    assert not plain.HasField("explanation")
    message = pb.Message(role="user", content="one two three")
    for prompt in ({"text": "one two three"}, {"conversation": {"messages": [message]}}):
        request = pb.ScoreRequest(**prompt, explain=True)
        answer = await stub.Score(request, metadata=KEY)
        explained, text = answer.explanation, answer.explanation.text
        assert answer.decision == pb.Decision(
            plan="prune", reason="asked", keep_rate=answer.decision.keep_rate,
            prompt_tokens=answer.decision.prompt_tokens, kept_tokens=3, mode="positions",
        )  # fmt: skip
        assert "one two three" in text
        assert "".join(text[each.start : each.end] for each in explained.spans) == text
        kept = [each for each in explained.spans if each.reasons]
        assert explained.kept_text == "".join(text[each.start : each.end] for each in kept)
        assert sum(each.end_token - each.first_token for each in kept) == 3
        assert (explained.rule.chunk_tokens, explained.keep) == (16, 0.5)
        assert explained.tokenize_s > 0
        assert not explained.HasField("certainty")


async def test_health_needs_no_key(stub: Any, health: Any) -> None:
    assert (await stub.Health(pb.HealthRequest())).serving is True
    health.counts["prefill"] = 0
    answer = await stub.Health(pb.HealthRequest())
    assert (answer.serving, answer.reason) == (False, "no healthy replica in: prefill")
    assert {pool.name: pool.healthy_replicas for pool in answer.pools}["decode"] == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InvalidRequest("n: no", "n"), grpc.StatusCode.INVALID_ARGUMENT),
        (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
        (Overloaded("full", 2.5, "deadline"), grpc.StatusCode.RESOURCE_EXHAUSTED),
        (Unavailable("gone"), grpc.StatusCode.UNAVAILABLE),
        (RuntimeError("secret"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_every_failure_has_its_code(
    stub: Any, pipeline: Any, error: Exception, code: grpc.StatusCode
) -> None:
    pipeline.fails = error
    unary = await failure(stub.Generate(text_request(), metadata=KEY))
    assert unary.code() is code
    assert "secret" not in unary.details()
    score = await failure(stub.Score(pb.ScoreRequest(text="a"), metadata=KEY))
    assert score.code() is code
    pipeline.fails_after = 1
    stream = stub.GenerateStream(text_request(), metadata=KEY)
    assert (await stream.read()).output.text == " alpha"
    assert (await failure(stream.read())).code() is code
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        assert unary.details() == "full; reason deadline; retry after 2.5 s"


@pytest.mark.parametrize(
    ("message", "field"),
    [
        (pb.GenerateRequest(), "input"),
        (text_request(sampling=pb.Sampling(temperature=-1)), "temperature"),
        (text_request(sampling=pb.Sampling(n=0)), "n"),
        (text_request(sampling=pb.Sampling(regex="(")), "regex"),
        (text_request(prune=pb.Prune(keep=0.0)), "prune.keep"),
        (text_request(prune=pb.Prune(keep=1.5)), "prune.keep"),
        (text_request(prune=pb.Prune(protect=[""])), "prune.protect"),
        (text_request(prune=pb.Prune(mode="dense")), "prune.mode"),
        (text_request(timeout_s=0.0), "timeout_s"),
        (text_request("long " * 4000), ""),
        (pb.GenerateRequest(token_ids=pb.TokenIds(ids=[10**6])), "vocabulary"),
        (pb.GenerateRequest(conversation=pb.Conversation()), "conversation.messages"),
        (
            pb.GenerateRequest(
                conversation=pb.Conversation(
                    messages=[pb.Message(role="user", content="a")], tools_json="{}"
                )
            ),
            "conversation.tools_json",
        ),
    ],
)
async def test_a_bad_request_names_its_field(
    stub: Any, pipeline: Any, message: pb.GenerateRequest, field: str
) -> None:
    refused = await failure(stub.Generate(message, metadata=KEY))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert field in refused.details()
    assert pipeline.requests == []


async def test_an_unknown_model_is_not_found(stub: Any, pipeline: Any) -> None:
    refused = await failure(stub.Generate(text_request(model="other"), metadata=KEY))
    assert refused.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("metadata", [(), (("authorization", "Bearer no"),), (("x", "test-key"),)])
async def test_a_stranger_is_unauthenticated(stub: Any, pipeline: Any, metadata: Any) -> None:
    refused = await failure(stub.Generate(text_request(), metadata=metadata))
    assert refused.code() is grpc.StatusCode.UNAUTHENTICATED
    stream = stub.GenerateStream(text_request(), metadata=metadata)
    assert (await failure(stream.read())).code() is grpc.StatusCode.UNAUTHENTICATED
    assert pipeline.requests == []


async def test_a_client_that_cancels_closes_the_pipeline(stub: Any, pipeline: Any) -> None:
    pipeline.pause_s = 30.0
    stream = stub.GenerateStream(text_request(), metadata=KEY)
    assert (await stream.read()).output.text == " alpha"
    stream.cancel()
    async with asyncio.timeout(10):
        await pipeline.ended.wait()
    assert pipeline.closed == 1


async def test_more_calls_than_the_gateway_holds_are_resource_exhausted(
    stub: Any, monkeypatch: Any
) -> None:
    monkeypatch.setattr(LIMIT, "most", 0)
    refused = await failure(stub.Generate(text_request(), metadata=KEY))
    assert refused.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "gateway_full" in refused.details()
    assert (await stub.Health(pb.HealthRequest())).serving
