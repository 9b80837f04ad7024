"""Arguments of `vllm serve`'s front that change answers, over both APIs."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from specprefill.core.types import Reasoning
from specprefill.rpc import specprefill_pb2 as pb
from tests.contract.conftest import (
    API_KEY,
    CHAT,
    JSON_LIMITS,
    KEYS,
    LIMIT,
    MAX_MESSAGE_BYTES,
    PLANNER,
    Call,
    ScriptedHealth,
    ScriptedPipeline,
    configuration,
    metrics_text,
    sampling,
)

MOST = 8  # tokens of every answer
SCHEMA = {
    "type": "json_schema",
    "json_schema": {"name": "it", "schema": {"type": "object", "properties": {}}},
}
# The end of the template opens the reasoning.
PLUGIN = """
from vllm.reasoning import ReasoningParserManager
from vllm.reasoning.basic_parsers import BaseThinkingReasoningParser


@ReasoningParserManager.register_module("marked")
class MarkedReasoningParser(BaseThinkingReasoningParser):
    start_token = "<|assistant|>"
    end_token = "<|pad|>"
"""


@pytest.fixture(scope="module")
def fronts(gateway: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The HTTP app, the gRPC API and the pipeline of a gateway with such arguments."""
    del gateway  # vLLM has been imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties
        from specprefill.gateway.grpc.api import GrpcApi
        from specprefill.gateway.openai.server import build_client, build_explainer, build_http_app

        plugin = tmp_path_factory.mktemp("plugin") / "marked.py"
        plugin.write_text(PLUGIN)
        limit = ["--override-generation-config", f'{{"max_new_tokens": {MOST}}}']
        parser = ["--reasoning-parser", "marked", "--reasoning-parser-plugin", str(plugin)]
        config = configuration(vllm_args=[*limit, *parser])
        pipeline, health = ScriptedPipeline(), ScriptedHealth()
        client = build_client(config, pipeline, PLANNER)
        app = asyncio.run(build_http_app(config, client, health, KEYS, LIMIT, metrics_text))
        api = GrpcApi(
            client,
            build_explainer(config, client),
            ("demo",),
            KEYS,
            LIMIT,
            health,
            max_message_bytes=MAX_MESSAGE_BYTES,
            json_limits=JSON_LIMITS,
        )
    yield app, api, pipeline
    client.renderer.shutdown()


@pytest.fixture
def pipeline(fronts: Any) -> ScriptedPipeline:
    fronts[2].reset()
    return fronts[2]


@pytest.fixture
async def http(fronts: Any, pipeline: ScriptedPipeline) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(fronts[0])
    key = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=key) as client:
        yield client


@pytest.mark.parametrize(("asked", "given"), [(1000, MOST), (None, MOST), (5, 5)])
async def test_no_answer_is_longer_than_the_deployments_limit(
    http: httpx.AsyncClient, fronts: Any, pipeline: Any, asked: int | None, given: int
) -> None:
    body = CHAT if asked is None else {**CHAT, "max_tokens": asked}
    answer = await http.post("/v1/chat/completions", json=body)
    assert (answer.status_code, sampling(pipeline)["max_tokens"]) == (200, given)
    message = pb.GenerateRequest(text="hello", sampling=pb.Sampling(max_tokens=asked))
    await fronts[1].generate(message, Call())
    assert sampling(pipeline)["max_tokens"] == given


async def test_the_engines_learn_how_far_the_reasoning_of_a_bound_answer_is(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    template = {"chat_template_kwargs": {"thinking": True}}
    body = {**CHAT, **template, "response_format": SCHEMA}
    answer = await http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    found = pipeline.requests[-1].reasoning
    assert found.has_ended is False
    kwargs = msgspec.msgpack.decode(found.parser_kwargs)
    assert kwargs["chat_template_kwargs"]["thinking"] is True


async def test_an_answer_without_reasoning_is_bound_from_its_first_token(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    body = {**CHAT, "include_reasoning": False, "response_format": SCHEMA}
    assert (await http.post("/v1/chat/completions", json=body)).status_code == 200
    assert pipeline.requests[-1].reasoning.has_ended is True


async def test_where_no_grammar_binds_the_answer_nothing_is_sent_of_it(
    http: httpx.AsyncClient, fronts: Any, pipeline: Any
) -> None:
    await http.post("/v1/chat/completions", json=CHAT)
    assert pipeline.requests[-1].reasoning is None
    await fronts[1].generate(pb.GenerateRequest(text="hello"), Call())
    assert pipeline.requests[-1].reasoning is None


async def test_over_grpc_a_grammar_binds_all_of_the_answer(fronts: Any, pipeline: Any) -> None:
    message = pb.GenerateRequest(text="hello", sampling=pb.Sampling(regex="[a-z]+"))
    await fronts[1].generate(message, Call())
    assert pipeline.requests[-1].reasoning.has_ended is True


async def test_template_arguments_that_cannot_be_sent_are_refused(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    body = {**CHAT, "chat_template_kwargs": {"x": 2**70}, "response_format": SCHEMA}
    answer = await http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "chat_template_kwargs"), answer.text
    assert pipeline.requests == []


async def test_a_thinking_budget_is_taken(http: httpx.AsyncClient, pipeline: Any) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "thinking_token_budget": 4})
    assert answer.status_code == 200, answer.text
    assert sampling(pipeline)["thinking_token_budget"] == 4


def test_a_request_keeps_its_reasoning_on_its_way_to_the_pools() -> None:
    from specprefill.core.types import Request
    from specprefill.core.wire import pack, unpack

    for reasoning in (None, Reasoning(None, None), Reasoning(has_ended=False, parser_kwargs=b"a")):
        request = Request("r", (1, 2), b"", reasoning=reasoning)
        assert unpack(pack(request), Request) == request
