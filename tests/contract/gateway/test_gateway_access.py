"""Access to the gateway: keys, open paths, limits, health and metrics."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from tests.contract.conftest import CHAT, LIMIT, SHED

# vLLM reads its own deprecated field.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

LONG = " ".join(["the quick brown fox jumps over the lazy dog"] * 12)
KEY = {"authorization": "Bearer test-key"}


async def test_a_stranger_is_refused(http: httpx.AsyncClient, pipeline: Any) -> None:
    headers = {"authorization": "Bearer wrong"}
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert (answer.status_code, pipeline.requests) == (401, [])


def every_route(app: Any) -> list[tuple[str, str]]:
    """Method and path of all routes, those of mounted apps and of nobody too."""
    found = [
        ("GET", "/nobody/knows"),
        ("POST", "/v1/nobody"),
        ("GET", "/health/"),
        ("GET", "//health"),
    ]
    for route in app.routes:
        path = route.path.replace("{", "").replace("}", "")
        found += [(method, path) for method in getattr(route, "methods", None) or {"GET", "POST"}]
        found += [("GET", f"{path}/below")] if not hasattr(route, "methods") else []
    return found


async def test_without_a_key_every_route_is_closed_but_the_open_ones(
    http: httpx.AsyncClient, gateway: Any, pipeline: Any
) -> None:
    routes = every_route(gateway[1])
    assert {"/v1/messages", "/metrics", "/openapi.json", "/tokenize"} <= {
        path for _, path in routes
    }
    for headers in ({"authorization": ""}, {"authorization": "Bearer wrong"}, {"x-api-key": "no"}):
        answers = {
            (method, path): await http.request(
                method, path, headers={"authorization": "", **headers}
            )
            for method, path in routes
        }
        open_paths = {path for (_, path), each in answers.items() if each.status_code != 401}
        assert open_paths == {"/health", "/ping"}
    refused = answers["POST", "/v1/nobody"]
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert pipeline.requests == []


@pytest.mark.parametrize(
    "headers", [{"authorization": "bearer other-key"}, {"x-api-key": "other-key"}]
)
async def test_the_pipeline_knows_a_key_by_its_name(
    http: httpx.AsyncClient, pipeline: Any, headers: dict[str, str]
) -> None:
    del http.headers["authorization"]
    assert (await http.post("/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
    assert pipeline.requests[-1].key == "others"


async def test_tokens_are_counted_by_the_name_of_the_key(
    http: httpx.AsyncClient, gateway: Any, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Any] = []
    monkeypatch.setattr(gateway[0], "_count_tokens", lambda *tokens: counted.append(tokens))
    await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert counted == [("tests", len(pipeline.requests[0].prompt), 3)]


async def test_a_websocket_without_a_key_is_closed(gateway: Any) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "headers": []}
    await gateway[1](scope, None, send)
    assert [message["type"] for message in sent] == ["websocket.close"]


async def test_a_cors_preflight_needs_no_key(http: httpx.AsyncClient) -> None:
    asked = {"origin": "http://page", "access-control-request-method": "POST", "authorization": ""}
    answer = await http.options("/v1/chat/completions", headers=asked)
    assert answer.status_code != 401
    assert "access-control-allow-methods" in answer.headers


async def test_more_requests_than_the_gateway_holds_are_429(
    http: httpx.AsyncClient, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LIMIT, "most", 1)
    SHED.clear()
    pipeline.pause_s = 30.0
    held = asyncio.create_task(http.post("/v1/chat/completions", json=CHAT))
    async with asyncio.timeout(10):
        await pipeline.began.wait()
        answer = await http.post("/v1/completions", json={"model": "demo", "prompt": "x"})
        health = await http.get("/health")
    held.cancel()
    await asyncio.gather(held, return_exceptions=True)
    assert answer.status_code == 429
    assert answer.headers["retry-after"] == "1"
    assert answer.headers["x-specprefill-shed-reason"] == "gateway_full"
    assert answer.json()["error"]["code"] == "overloaded"
    assert health.status_code == 200
    assert SHED == ["gateway_full"]
    assert LIMIT.held == 0


async def test_health_names_the_empty_pool(http: httpx.AsyncClient, health: Any) -> None:
    answer = await http.get("/health", headers={"authorization": ""})
    assert (answer.status_code, answer.json()["status"]) == (200, "ok")
    health.counts["speculator"] = 0
    answer = await http.get("/health")
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    health.counts["decode"] = 0
    answer = await http.get("/health")
    assert answer.status_code == 503
    assert answer.json()["reason"] == "no healthy replica in: speculator, decode"


async def test_metrics_are_those_of_the_service_not_of_this_process(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.get("/metrics")
    assert answer.text == "ray_specprefill_requests_total 3.0\n"
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
