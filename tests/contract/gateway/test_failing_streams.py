"""Streams that fail, on every route: a status before the first output, a last event after it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest

from specprefill.core.errors import DeadlineExceeded, Overloaded, Unavailable
from tests.contract.conftest import API_KEY, WORDS
from tests.contract.gateway.test_gateway_bytes import BODIES

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quiet"),
]

RESPONSES = "/v1/responses"
GENERATING = ["/v1/chat/completions", "/v1/completions", RESPONSES, "/v1/messages"]


def streamed(path: str, **fields: Any) -> dict[str, Any]:
    return {"model": "demo", **BODIES[path], "stream": True, **fields}


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("full", 4.0, "queue_full"), 429, "4"),
        (Unavailable("no prefill replica"), 503, "1"),
        (DeadlineExceeded("too late"), 504, None),
    ],
)
@pytest.mark.parametrize("path", GENERATING)
async def test_a_failure_before_the_first_output_is_a_status(
    http: httpx.AsyncClient,
    pipeline: Any,
    path: str,
    error: Exception,
    status: int,
    retry_after: str | None,
) -> None:
    pipeline.fails = error
    answer = await http.post(path, json=streamed(path))
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, retry_after)
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["message"] == str(error)
    assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", RESPONSES])
async def test_a_request_that_is_refused_as_it_is_prepared_is_a_status(
    http: httpx.AsyncClient, pipeline: Any, path: str
) -> None:
    answer = await http.post(path, json=streamed(path, priority=2**40))
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "priority")
    assert pipeline.requests == []


async def test_a_response_that_fails_in_its_stream_ends_with_an_error_event(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    pipeline.fails, pipeline.fails_after = Unavailable("gone"), 2
    answer = await http.post(RESPONSES, json=streamed(RESPONSES))
    *events, last = answer.text.removesuffix("\n\n").split("\n\n")
    assert answer.status_code == 200
    assert "".join(WORDS[:2]) == "".join(
        json.loads(event.split("data: ")[1]).get("delta", "") for event in events
    )
    assert last.startswith("event: error\ndata: ")
    assert json.loads(last.split("data: ")[1]) == {
        "type": "error", "code": "unavailable", "message": "gone", "param": None,
        "sequence_number": len(events), "request_id": answer.headers["x-request-id"],
    }  # fmt: skip


async def test_openais_client_reads_the_error_event(
    client: openai.AsyncOpenAI, pipeline: Any
) -> None:
    pipeline.fails, pipeline.fails_after = Unavailable("gone"), 1
    stream = await client.responses.create(model="demo", input="hello", stream=True)
    events = [event async for event in stream]
    assert (events[-1].type, events[-1].code) == ("error", "unavailable")
    assert [event.sequence_number for event in events] == list(range(len(events)))


@pytest.mark.parametrize("path", GENERATING)
async def test_the_first_output_is_not_held_back(gateway: Any, pipeline: Any, path: str) -> None:
    pipeline.pause_s = 30.0  # after each chunk
    body = json.dumps(streamed(path)).encode()
    requests = [{"type": "http.request", "body": body, "more_body": False}]
    gone, came = asyncio.Event(), asyncio.Event()
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if requests:
            return requests.pop()
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)
        if WORDS[0].encode() in message.get("body", b""):
            came.set()

    scope = {
        "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "root_path": "", "scheme": "http", "http_version": "1.1",
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "server": ("x", 80), "client": ("y", 1),
        "headers": [(b"authorization", f"Bearer {API_KEY}".encode()),
                    (b"content-type", b"application/json")],
    }  # fmt: skip
    call = asyncio.create_task(gateway[1](scope, receive, send))
    async with asyncio.timeout(10):
        await came.wait()
        gone.set()
        await call
    assert sent[0]["status"] == 200
