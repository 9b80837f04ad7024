"""What ties a call's traces together: its request id, and its span.

The id is the client's `x-request-id`, or a new one. It is part of the request's id in every pool's
log, and comes back as a header and in the body of an error. The span's parent is the client's
`traceparent` (W3C Trace Context); the answer's `traceparent` names the span.
"""

from __future__ import annotations

import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ...core.request_spans import OpenSpan, SpanKind, TraceContext, Tracer
from .routes import TRACED

REQUEST_ID_HEADER = "x-request-id"
MAX_ID = 256  # characters of a request id: every log line holds it
TRACE = "specprefill.trace"  # in a scope: the TraceContext of the call's span
MADE = "specprefill.request_id_made"  # in a scope: the client named no id in a header
TRACEPARENT, TRACESTATE = "traceparent", "tracestate"


class CorrelationMiddleware:
    """The outermost layer: names each request, and records a span for those about a prompt.

    `under_serve`: the server around the app adds the id to every response, as Ray Serve's does.
    """

    def __init__(self, app: ASGIApp, tracer: Tracer, *, under_serve: bool = False) -> None:
        self._app = app
        self._tracer = tracer
        self._under_serve = under_serve

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        request_id = headers.get(REQUEST_ID_HEADER)
        if request_id is None:
            request_id = uuid.uuid4().hex
            scope = named_scope({**scope, MADE: True}, request_id)
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        header = None if self._under_serve else request_id
        if scope["method"] != "POST" or path not in TRACED:
            await self._app(scope, receive, _Labelled(send, header))
            return
        parent = trace_parent(headers.get(TRACEPARENT), headers.get(TRACESTATE))
        with self._tracer.start(f"POST {path}", parent, SpanKind.SERVER) as span:
            span.annotate({"http.request.method": "POST", "http.route": path})
            labelled = _Labelled(send, header, span)
            traced = scope if span.context is None else {**scope, TRACE: span.context}
            await self._app(traced, receive, labelled)


class _Labelled:
    """Adds the request id, if there is one, and the span to a response's headers."""

    def __init__(self, send: Send, request_id: str | None, span: OpenSpan | None = None) -> None:
        self._to_client = send
        self._request_id = request_id
        self._span = span

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=message["headers"])
            # Once: vLLM appends it, too.
            named = headers.get(REQUEST_ID_HEADER, self._request_id)
            del headers[REQUEST_ID_HEADER]
            if self._request_id is not None and named is not None:
                headers[REQUEST_ID_HEADER] = named
            if self._span is not None:
                self._span.annotate({"http.response.status_code": message["status"]})
                context = self._span.context
                if context is not None:
                    headers[TRACEPARENT] = context.traceparent
        await self._to_client(message)


def named_scope(scope: Scope, request_id: str) -> Scope:
    """Return the scope with this id in its headers, in place of any other."""
    name = REQUEST_ID_HEADER.encode()
    others = [pair for pair in scope["headers"] if pair[0] != name]
    return {**scope, "headers": [*others, (name, request_id.encode())]}


def trace_parent(traceparent: str | None, tracestate: str | None) -> TraceContext | None:
    """Return a caller's span; the tracer ignores what is malformed."""
    return None if traceparent is None else TraceContext(traceparent, tracestate or "")


def is_request_id(value: str) -> bool:
    """Return True for what a log line and a header can hold."""
    return len(value) <= MAX_ID and value.isascii() and value.isprintable()


def request_id_of(scope: Scope) -> str | None:
    """Return the request's id, unless it is one that is refused."""
    value = Headers(scope=scope).get(REQUEST_ID_HEADER)
    return value if value is not None and is_request_id(value) else None
