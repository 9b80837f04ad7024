"""A request's id and its trace, on the way in and out."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from specprefill.core.errors import Unavailable
from tests.contract.conftest import CHAT
from tests.spans import RecordedTraces

# vLLM reads its own deprecated field.
pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

CHATS = "/v1/chat/completions"
TRACE, CALLER = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture
def traces() -> RecordedTraces:
    return RecordedTraces()


@pytest.fixture
async def traced(gateway: Any, pipeline: Any, traces: Any) -> AsyncIterator[httpx.AsyncClient]:
    """The same app with another outermost layer, which records spans."""
    from specprefill.gateway.openai.correlation import CorrelationMiddleware

    app = CorrelationMiddleware(gateway[1], traces.tracer)
    key = {"authorization": "Bearer test-key"}
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=key) as client:
        yield client


async def test_the_callers_id_is_in_the_requests_and_comes_back(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    answer = await http.post(CHATS, json=CHAT, headers={"x-request-id": "order-7"})
    assert answer.headers["x-request-id"] == "order-7"
    assert "order-7" in pipeline.requests[0].request_id


async def test_a_request_without_an_id_gets_one(http: httpx.AsyncClient, pipeline: Any) -> None:
    answer = await http.post(CHATS, json=CHAT)
    assert answer.headers.get_list("x-request-id") == [answer.headers["x-request-id"]]
    assert answer.headers["x-request-id"] in pipeline.requests[0].request_id


@pytest.mark.parametrize("body", [{"specprefill": {"keep": 2}}, {"temperature": "hot"}])
async def test_refusals_name_their_request(http: httpx.AsyncClient, body: dict[str, Any]) -> None:
    answer = await http.post(CHATS, json={**CHAT, **body}, headers={"x-request-id": "order-7"})
    assert (answer.status_code, answer.json()["request_id"]) == (400, "order-7")


async def test_failures_in_a_stream_name_their_request(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    pipeline.fails, pipeline.fails_after = Unavailable("gone"), 1
    body, headers = {**CHAT, "stream": True}, {"x-request-id": "order-7"}
    answer = await http.post(CHATS, json=body, headers=headers)
    assert '"request_id": "order-7"' in answer.text


async def test_an_id_in_the_body_counts_where_no_header_names_one(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    body = {**CHAT, "request_id": "order-8"}
    answer = await http.post(CHATS, json=body)
    assert answer.headers.get_list("x-request-id") == ["order-8"]
    assert answer.json()["id"] == "chatcmpl-order-8"
    both = await http.post(CHATS, json=body, headers={"x-request-id": "order-7"})
    assert both.headers.get_list("x-request-id") == ["order-7"]
    assert "order-7" in pipeline.requests[1].request_id


async def test_strangers_get_an_id_too(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHATS, json=CHAT, headers={"authorization": "Bearer no"})
    assert (answer.status_code, answer.json()["request_id"]) == (
        401,
        answer.headers["x-request-id"],
    )


async def test_a_call_has_a_span_below_its_callers(
    traced: httpx.AsyncClient, traces: Any, pipeline: Any
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01", "tracestate": "vendor=1"}
    answer = await traced.post(CHATS, json=CHAT, headers=headers)
    (span,) = traces.spans().values()
    assert (span.name, span.trace, span.parent) == (f"POST {CHATS}", TRACE, CALLER)
    assert span.attributes["http.response.status_code"] == 200
    assert answer.headers["traceparent"] == f"00-{TRACE}-{span.id}-01"
    trace = pipeline.requests[0].trace
    assert (trace.traceparent, trace.tracestate) == (answer.headers["traceparent"], "vendor=1")


async def test_a_refused_call_has_its_status_in_its_span(
    traced: httpx.AsyncClient, traces: Any
) -> None:
    await traced.post(CHATS, json={**CHAT, "specprefill": {"keep": 2}})
    assert traces.spans()[f"POST {CHATS}"].attributes["http.response.status_code"] == 400


async def test_other_routes_have_no_span(traced: httpx.AsyncClient, traces: Any) -> None:
    await traced.get("/v1/models")
    assert traces.spans() == {}


async def test_without_tracing_a_request_carries_no_context(
    http: httpx.AsyncClient, pipeline: Any
) -> None:
    headers = {"traceparent": f"00-{TRACE}-{CALLER}-01"}
    answer = await http.post(CHATS, json=CHAT, headers=headers)
    assert "traceparent" not in answer.headers
    assert pipeline.requests[0].trace is None
