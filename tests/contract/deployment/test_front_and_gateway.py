"""The real HTTP app behind the real HAProxy: what one passes on, the other understands."""

from __future__ import annotations

import asyncio
import json

import httpx
import pytest
from starlette.responses import PlainTextResponse

from tests.contract.conftest import API_KEY, LIMIT
from tests.contract.fronts import HOST, running, serve_config, serving

pytestmark = [
    pytest.mark.timeout(120),
    # vLLM reads its own deprecated field.
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
]

NOTICED_S = 10.0
KEY = {"authorization": f"Bearer {API_KEY}"}
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}


@pytest.fixture
async def front(gateway, pipeline, tmp_path):
    async def app(scope, receive, send):
        """Serve answers HAProxy's health checks before the app."""
        healthy = PlainTextResponse("healthy")
        await (healthy if scope["path"] == "/-/healthz" else gateway[1])(scope, receive, send)

    async with serving(app) as port:
        with running(serve_config(tmp_path, [port]), {}) as front:
            yield front


def request(path, body):
    content = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {API_KEY}\r\n"
    more = f"content-type: application/json\r\ncontent-length: {len(content)}\r\n\r\n"
    return (head + more).encode() + content


@pytest.mark.parametrize("kept_alive", [False, True])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", CHAT),
        ("/v1/completions", {"model": "demo", "prompt": "hello"}),
        ("/v1/messages", {**CHAT, "max_tokens": 9}),
        ("/v1/responses", {"model": "demo", "input": "hello"}),
    ],
)
async def test_a_client_that_leaves_ends_its_request(
    front, pipeline, path, body, stream, kept_alive
):
    reader, writer = await asyncio.open_connection(HOST, front.http_port)
    if kept_alive:
        writer.write(request(path, body))
        await pipeline.ended.wait()
        await reader.readuntil(b"charlie")
        await reader.read(1 << 16)
    pipeline.reset()
    pipeline.pause_s = 30.0
    writer.write(request(path, {**body, "stream": stream}))
    async with asyncio.timeout(10):
        await pipeline.began.wait()
        if stream:
            await reader.readuntil(b"data: {")
    writer.close()
    async with asyncio.timeout(NOTICED_S):
        await pipeline.ended.wait()
    assert pipeline.closed == 1


async def test_no_slot_is_held_after_clients_have_left(front, pipeline):
    pipeline.pause_s = 30.0
    async with httpx.AsyncClient(timeout=30, headers=KEY) as client:
        asked = [
            asyncio.create_task(client.post(f"{front.url}/v1/chat/completions", json=CHAT))
            for _ in range(8)
        ]
        await pipeline.began.wait()
        for task in asked:
            task.cancel()
        await asyncio.gather(*asked, return_exceptions=True)
    async with asyncio.timeout(NOTICED_S + 1):
        while LIMIT.held:  # noqa: ASYNC110 - a count, not an event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("timeout_s", ["0.001", "0.5"])
async def test_the_time_limit_comes_through_the_front(front, pipeline, timeout_s):
    headers = {**KEY, "x-request-timeout-seconds": timeout_s}
    async with httpx.AsyncClient(headers=headers) as client:
        await client.post(f"{front.url}/v1/chat/completions", json=CHAT)
    limit_s = float(timeout_s)
    assert 0.0 <= limit_s - pipeline.requests[-1].timeout_s < min(limit_s, 0.2)


async def test_a_body_that_stops_half_way_is_given_up_by_the_gateway(front, pipeline, monkeypatch):
    reader, writer = await asyncio.open_connection(HOST, front.http_port)
    head = f"POST /v1/completions HTTP/1.1\r\nhost: t\r\nauthorization: Bearer {API_KEY}\r\n"
    writer.write(f"{head}content-length: 90000\r\n\r\n".encode() + b"x" * 40_000)
    answer = await asyncio.wait_for(reader.readuntil(b'"}'), 15)
    writer.close()
    assert b" 408 " in answer
    assert b"request_timeout" in answer
    assert pipeline.requests == []
