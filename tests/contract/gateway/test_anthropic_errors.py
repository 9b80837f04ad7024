"""Errors of the messages API, in Anthropic's form."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from tests.contract.gateway.test_gateway_bytes import BODIES, DEEP

pytestmark = [
    pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("quiet"),
]

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"[" * DEEP, 400, "invalid_request_error"),
        (b'{"model": "demo", "specprefill": {"keep": 2}}', 400, "invalid_request_error"),
        (b'{"model": "demo", "max_tokens": 3}', 400, "invalid_request_error"),
        (b'{"model": "demo", "max_tokens": 3, "x": "' + b"x" * 10**5 + b'"}', 413,
         "request_too_large"),
    ],
)  # fmt: skip
async def test_messages_are_refused_in_anthropics_form(
    http: httpx.AsyncClient, body: bytes, status: int, kind: str
) -> None:
    answer = await http.post("/v1/messages", content=body, headers=JSON)
    assert (answer.status_code, answer.json()["type"]) == (status, "error")
    assert answer.json()["error"].keys() == {"type", "message"}
    assert answer.json()["error"]["type"] == kind


@pytest.mark.parametrize("stream", [False, True])
async def test_messages_fail_in_anthropics_form(
    http: httpx.AsyncClient, pipeline: Any, stream: bool
) -> None:
    from specprefill.core.errors import Overloaded

    pipeline.fails = Overloaded("full", 4.0, "queue_full")
    body = {"model": "demo", **BODIES["/v1/messages"], "stream": stream}
    answer = await http.post("/v1/messages", json=body)
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "4")
    assert answer.json() == {
        "type": "error", "error": {"type": "rate_limit_error", "message": "full"},
        "request_id": answer.headers["x-request-id"],
    }  # fmt: skip


async def test_a_stranger_is_refused_in_anthropics_form(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/messages", json={}, headers={"authorization": "Bearer no"})
    assert (answer.status_code, answer.json()["error"]["type"]) == (401, "authentication_error")


async def test_a_failing_stream_ends_in_anthropics_form(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    from specprefill.core.errors import Unavailable

    pipeline.fails, pipeline.fails_after = Unavailable("gone"), 1
    body = {"model": "demo", **BODIES["/v1/messages"], "stream": True}
    answer = await http.post("/v1/messages", json=body)
    events = [
        json.loads(line[6:]) for line in answer.text.split("\n") if line.startswith("data: {")
    ]
    assert events[-1] == {
        "type": "error", "error": {"type": "overloaded_error", "message": "gone"},
        "request_id": answer.headers["x-request-id"],
    }  # fmt: skip
