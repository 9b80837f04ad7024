"""How the gateway's metrics count requests that fail, over HTTP."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest

from specprefill.core.errors import Overloaded
from specprefill.gateway.observe.metrics import PipelineMetrics, RequestMetrics
from specprefill.gateway.observe.watched import ObservedPipeline
from specprefill.gateway.openai.access import RequestLimit
from tests.contract.conftest import (
    API_KEY,
    CHAT,
    KEYS,
    PLANNER,
    ScriptedHealth,
    ScriptedPipeline,
    configuration,
    metrics_text,
)
from tests.instruments import Instruments

Observed = tuple[httpx.AsyncClient, ScriptedPipeline, Instruments]
BUFFERED_BYTES = 20_000


@pytest.fixture(scope="module")
def observed_app(gateway: Any) -> Iterator[tuple[Any, Any, Any, Any]]:
    """A gateway whose pipeline is observed: app, pipeline, limit, and its metrics to exchange."""
    del gateway  # vLLM has been imported
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties
        from specprefill.gateway.openai.server import build_client, build_http_app

        pipeline, observers = ScriptedPipeline(), list[Any]()
        counted = list[PipelineMetrics]()
        config = configuration(max_buffered_bytes=BUFFERED_BYTES)
        client = build_client(config, ObservedPipeline(pipeline, observers), PLANNER)
        limit = RequestLimit(64, lambda reason: counted[-1].count_shed(reason))
        app = asyncio.run(
            build_http_app(config, client, ScriptedHealth(), KEYS, limit, metrics_text)
        )
    yield app, pipeline, limit, (observers, counted)
    client.renderer.shutdown()


@pytest.fixture
def limit(observed_app: tuple[Any, Any, Any, Any]) -> RequestLimit:
    """The limit of that gateway, with room for requests."""
    found: RequestLimit = observed_app[2]
    found.most = 64
    return found


@pytest.fixture
async def observed(observed_app: tuple[Any, Any, Any, Any]) -> AsyncIterator[Observed]:
    """A client of that gateway, its pipeline, and what is counted from now on."""
    app, pipeline, _, (observers, metrics) = observed_app
    pipeline.reset()
    counted = Instruments()
    metrics[:] = [PipelineMetrics(counted)]
    observers[:] = [RequestMetrics(metrics[0])]
    transport = httpx.ASGITransport(app)
    key = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=key) as client:
        yield client, pipeline, counted


def ended(counted: Instruments, outcome: str) -> float:
    return float(counted.total("specprefill_requests_total", outcome, "", ""))


@pytest.mark.parametrize("after", [0, 1], ids=["before the first token", "after it"])
async def test_an_unexpected_failure_is_no_client_that_left(observed: Observed, after: int) -> None:
    http, pipeline, counted = observed
    pipeline.fails, pipeline.fails_after = RuntimeError("a fault"), after
    answer = await http.post("/v1/chat/completions", json=CHAT)
    assert answer.status_code == 500
    assert (ended(counted, "RuntimeError"), ended(counted, "client_closed")) == (1, 0)


async def test_a_shed_selection_is_counted_with_its_reason(observed: Observed) -> None:
    http, pipeline, counted = observed
    pipeline.fails = Overloaded("full", 4.0, "queue_full")
    answer = await http.post("/v1/selections", json=CHAT)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
    assert counted.total("specprefill_shed_total", "queue_full") == 1
    assert ended(counted, "Overloaded") == 0  # it asked for no answer


async def test_a_request_without_a_slot_is_counted_as_shed_and_as_ended(
    observed: Observed, limit: RequestLimit
) -> None:
    http, pipeline, counted = observed
    limit.most = 0
    answer = await http.post("/v1/chat/completions", json=CHAT)
    limit.most = 64
    assert answer.status_code == 429
    assert counted.total("specprefill_shed_total", "gateway_full") == 1
    assert ended(counted, "Overloaded") == 1
    assert pipeline.requests == []


async def test_a_body_without_room_is_counted_as_shed_and_as_ended(observed: Observed) -> None:
    http, _, counted = observed
    answer = await http.post("/v1/completions", content=b"x" * (BUFFERED_BYTES + 1))
    assert answer.status_code == 429
    assert counted.total("specprefill_shed_total", "bodies_full") == 1
    assert ended(counted, "Overloaded") == 1


async def test_a_request_that_the_pipeline_sheds_is_counted_once(observed: Observed) -> None:
    http, pipeline, counted = observed
    pipeline.fails = Overloaded("full", 4.0, "queue_full")
    assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 429
    assert counted.total("specprefill_shed_total", "queue_full") == 1
    assert ended(counted, "Overloaded") == 1
