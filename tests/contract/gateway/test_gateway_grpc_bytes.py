"""Any bytes of a gRPC client get an answer or INVALID_ARGUMENT."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from specprefill.rpc import specprefill_pb2 as pb
from tests.contract.conftest import MAX_MESSAGE_BYTES
from tests.contract.gateway.test_gateway_grpc import KEY, channel, failure, stub

__all__ = ["channel", "stub"]  # the fixtures

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quiet"),
]

DEEP = 20_000


def sampled(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="hello", sampling=pb.Sampling(**fields))


def conversation(**fields: Any) -> pb.GenerateRequest:
    fields = {"messages": [pb.Message(role="user", content="a")], **fields}
    return pb.GenerateRequest(conversation=pb.Conversation(**fields))


@pytest.mark.parametrize(
    ("message", "details"),
    [
        (conversation(tools_json="[" * DEEP), "conversation.tools_json"),
        (conversation(tools_json="[{]"), "conversation.tools_json"),
        (conversation(tools_json="[NaN]"), "conversation.tools_json"),
        (conversation(tools_json='["a"]'), "conversation.tools_json"),
        (conversation(messages=[pb.Message(role="user", content="a")] * 2001), "2000 messages"),
        (sampled(temperature=float("nan")), "sampling.temperature"),
        (sampled(temperature=float("inf")), "sampling.temperature"),
        (sampled(top_p=float("nan")), "sampling.top_p"),
        (sampled(repetition_penalty=float("-inf")), "sampling.repetition_penalty"),
        (sampled(json_schema="[" * DEEP), "sampling.json_schema"),
        (sampled(json_schema="{"), "sampling.json_schema"),
        (sampled(n=2**32 - 1), "n"),
        (sampled(logprobs=2**32 - 1), "logprobs"),
        (sampled(stop_token_ids=[2**32 - 1]), "stop_token_ids"),
        (sampled(stop=[""]), "stop"),
        (pb.GenerateRequest(text="x" * MAX_MESSAGE_BYTES), "bytes"),
        (pb.GenerateRequest(token_ids=pb.TokenIds()), ""),
        (pb.GenerateRequest(model="x" * 50_000, text="a"), ""),
    ],
)
async def test_a_bad_message_is_an_invalid_argument(
    stub: Any, pipeline: Any, message: pb.GenerateRequest, details: str
) -> None:
    for call in (stub.Generate, stub.GenerateStream):
        refused = await failure(_first(call(message, metadata=KEY)))
        assert refused.code() in {grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
        assert details in refused.details()
        assert len(refused.details()) < 2000
    assert pipeline.requests == []


async def _first(call: Any) -> Any:
    return await (call.read() if hasattr(call, "read") else call)


@pytest.mark.parametrize("method", ["Generate", "GenerateStream", "Score"])
@pytest.mark.parametrize("payload", [b"\xff\xff\xff", b"\x1a\x02\xff\xfe", b"\x08"])
async def test_bytes_that_are_no_message_are_an_invalid_argument(
    stub: Any, channel: grpc.aio.Channel, pipeline: Any, method: str, payload: bytes
) -> None:
    path = f"/specprefill.v1.SpecPrefill/{method}"
    kind = channel.unary_stream if method == "GenerateStream" else channel.unary_unary
    call = kind(path, request_serializer=bytes, response_deserializer=bytes)
    refused = await failure(_first(call(payload, metadata=KEY)))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert pipeline.requests == []


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(payload=st.binary(max_size=40))
async def test_any_bytes_have_an_answer(
    stub: Any, channel: grpc.aio.Channel, payload: bytes
) -> None:
    path = "/specprefill.v1.SpecPrefill/Generate"
    call = channel.unary_unary(path, request_serializer=bytes, response_deserializer=bytes)
    answer = call(payload, metadata=KEY)
    async with asyncio.timeout(10):
        code = await answer.code()
    assert code in {
        grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND,
    }  # fmt: skip


async def test_an_id_that_a_log_line_cannot_hold_is_an_invalid_argument(
    stub: Any, pipeline: Any
) -> None:
    metadata = (*KEY, ("x-request-id", "x" * 257))
    refused = await failure(stub.Generate(pb.GenerateRequest(text="a"), metadata=metadata))
    assert refused.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "x-request-id: must be at most 256 printable ASCII characters" in refused.details()
    assert pipeline.requests == []
