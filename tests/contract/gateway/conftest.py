"""A gateway whose selections follow the rules, beside the scripted one."""

from __future__ import annotations

import asyncio
import warnings
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from specprefill.control.from_config import kv_block_tokens, selection_policy
from specprefill.core.plan import Planner
from specprefill.gateway.openai.access import RequestLimit
from tests.contract.conftest import API_KEY, KEYS, ScriptedHealth, configuration, metrics_text
from tests.contract.gateway.scoring_pools import ScoringSpeculator, scoring_pipeline


@dataclass(frozen=True)
class ScoringGateway:
    """One gateway over pools with made-up scores."""

    app: Any
    client: Any
    speculator: ScoringSpeculator


@pytest.fixture(scope="session")
def scoring_gateway(gateway: Any) -> Iterator[ScoringGateway]:
    """The page is open; every other route needs a key."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties
        from specprefill.gateway.openai.server import build_client, build_http_app

        config = configuration(
            open_paths=("/health", "/ping", "/playground"),
            vllm_args=["--enable-auto-tool-choice", "--tool-call-parser", "hermes"],
        )
        policy = selection_policy(config.selection, kv_block_tokens(config.prefill))
        pipeline, speculator = scoring_pipeline(policy)
        planner = Planner(enabled=True, keep=0.3, min_prompt_tokens=48)
        client = build_client(config, pipeline, planner)
        limit = RequestLimit(64, lambda _reason: None)
        app = asyncio.run(
            build_http_app(config, client, ScriptedHealth(), KEYS, limit, metrics_text)
        )
    yield ScoringGateway(app, client, speculator)
    client.renderer.shutdown()


@pytest.fixture
async def scoring(scoring_gateway: ScoringGateway) -> AsyncIterator[httpx.AsyncClient]:
    """A client of that gateway, with a key."""
    scoring_gateway.speculator.fails = None
    scoring_gateway.speculator.requests.clear()
    transport = httpx.ASGITransport(scoring_gateway.app)
    key = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=key) as client:
        yield client
