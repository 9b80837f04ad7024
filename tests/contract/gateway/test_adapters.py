"""LoRA adapters as models of their own: over HTTP and gRPC."""

import warnings
from typing import Any

import grpc
import httpx
import openai
import pytest

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
)

NAMES = ("demo", "lawyer", "doctor")


@pytest.fixture(scope="module")
def adapting(tmp_path_factory) -> Any:
    """A deployment's configuration with two adapters, its pipeline and its client."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, while they are imported
        from specprefill.gateway.openai.server import build_client

        config = configuration()
        adapters = {name: str(tmp_path_factory.mktemp(name)) for name in NAMES[1:]}
        model = config.model.model_copy(update={"adapters": adapters})
        config = config.model_copy(update={"model": model})
        pipeline = ScriptedPipeline()
        client = build_client(config, pipeline, PLANNER)
    yield config, client, pipeline
    client.renderer.shutdown()


@pytest.fixture
async def api(adapting) -> Any:
    from specprefill.gateway.openai.server import build_http_app

    config, client, pipeline = adapting
    pipeline.reset()
    app = await build_http_app(config, client, ScriptedHealth(), KEYS, LIMIT, metrics_text)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with openai.AsyncOpenAI(
        api_key=API_KEY, base_url="http://x/v1", http_client=http, max_retries=0
    ) as asking:
        yield asking


async def test_every_adapter_is_a_model(api):
    listed = await api.models.list()
    assert [model.id for model in listed.data] == list(NAMES)


async def test_the_models_name_chooses_the_adapter(api, adapting):
    long = [{"role": "user", "content": "word " * 400}]
    for name in NAMES:
        answer = await api.chat.completions.create(model=name, messages=long)
        assert answer.model == name
    requests = adapting[2].requests
    assert [request.adapter for request in requests] == [None, "lawyer", "doctor"]
    first, second, third = (set(request.digests) for request in requests)
    assert first.isdisjoint(second | third)
    assert second.isdisjoint(third)


async def test_a_selection_is_that_of_the_adapters_prompt(api, adapting):
    for name in NAMES:
        body = {"model": name, "prompt": "word " * 400}
        chosen = await api.post("/selections", body=body, cast_to=dict)
        assert chosen["model"] == name
    requests = adapting[2].requests
    assert [request.adapter for request in requests] == [None, "lawyer", "doctor"]
    assert len({request.digests for request in requests}) == len(NAMES)


async def test_another_name_is_not_found(api):
    with pytest.raises(openai.NotFoundError):
        await api.chat.completions.create(model="nurse", messages=CHAT["messages"])


async def test_grpc_names_an_adapter_likewise(adapting):
    from specprefill.gateway.grpc.api import GrpcApi
    from specprefill.gateway.openai.server import build_explainer

    config, client, pipeline = adapting
    pipeline.reset()
    served = GrpcApi(
        client, build_explainer(config, client), config.model.served_names, KEYS, LIMIT,
        ScriptedHealth(), max_message_bytes=MAX_MESSAGE_BYTES, json_limits=JSON_LIMITS,
    )  # fmt: skip
    for name in NAMES:
        await served.generate(pb.GenerateRequest(text="hello", model=name), Call())
    assert [request.adapter for request in pipeline.requests] == [None, "lawyer", "doctor"]
    refused = Call()
    with pytest.raises(Exception, match="nurse"):
        await served.generate(pb.GenerateRequest(text="hello", model="nurse"), refused)
    assert refused.code is grpc.StatusCode.NOT_FOUND
