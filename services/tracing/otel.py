"""The port `Tracer` over OpenTelemetry's SDK.

The provider is this service's own, not the process's global one: vLLM and Ray set theirs.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.sdk.resources import SERVICE_NAME, Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from .. import __version__
from ..core.request_spans import (
    Attributes,
    NoSpan,
    OpenSpan,
    SpanKind,
    SpanPart,
    TraceContext,
)

SERVICE = "specprefill"  # unless OTEL_SERVICE_NAME is set
_KINDS = {
    SpanKind.SERVER: trace.SpanKind.SERVER,
    SpanKind.CLIENT: trace.SpanKind.CLIENT,
    SpanKind.INTERNAL: trace.SpanKind.INTERNAL,
}
_W3C = TraceContextTextMapPropagator()


class OtelTracer:
    """Records spans and exports them. `processor` replaces the exporter that the variables choose.

    The exporter's threads and connection begin with the first span: an engine is forked before.
    """

    is_on = True

    def __init__(
        self, role: str, protocol: str = "grpc", processor: SpanProcessor | None = None
    ) -> None:
        self._role = role
        self._exporter = _exporter_of(protocol)
        self._processor = processor

    @cached_property
    def _tracer(self) -> trace.Tracer:
        resource = Resource.create(
            {
                SERVICE_NAME: os.environ.get("OTEL_SERVICE_NAME", SERVICE),
                "service.version": __version__,
                "service.instance.id": f"{self._role}-{socket.gethostname()}-{os.getpid()}",
                "specprefill.role": self._role,
                "process.pid": os.getpid(),
            }
        )
        provider = TracerProvider(resource=resource)
        provider.add_span_processor(self._processor or BatchSpanProcessor(self._exporter()))
        return provider.get_tracer(SERVICE, __version__)

    @contextmanager
    def start(self, name: str, parent: TraceContext | None, kind: SpanKind) -> Iterator[OpenSpan]:
        """See `core.request_spans.Tracer`."""
        clock = _UnixClock()
        inside = self._tracer.start_span(
            name, context=_context_of(parent), kind=_KINDS[kind], start_time=clock.now_ns()
        )
        if not inside.is_recording():
            yield NoSpan()
            return
        span = _Recorded(self._tracer, inside, clock)
        try:
            yield span
        except Exception as error:
            span.record_error(error)
            raise
        finally:
            span.end()

    def start_within(
        self, name: str, parent: TraceContext | None, kind: SpanKind = SpanKind.INTERNAL
    ) -> AbstractContextManager[OpenSpan]:
        """See `core.request_spans.Tracer`."""
        return nullcontext(NoSpan()) if parent is None else self.start(name, parent, kind)


class _UnixClock:
    """Converts `time.monotonic()` to nanoseconds since 1970, alike for a span and its parts."""

    def __init__(self) -> None:
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    def now_ns(self) -> int:
        return time.monotonic_ns() + self._offset_ns

    def unix_ns(self, monotonic_s: float) -> int:
        return int(monotonic_s * 1e9) + self._offset_ns


class _Recorded:
    """A span that is recorded."""

    def __init__(self, tracer: trace.Tracer, span: trace.Span, clock: _UnixClock) -> None:
        self._tracer = tracer
        self._span = span
        self._clock = clock
        self._started_ns = clock.now_ns()
        self._has_ended = False

    @property
    def context(self) -> TraceContext:
        carrier: dict[str, str] = {}
        _W3C.inject(carrier, trace.set_span_in_context(self._span, Context()))
        return TraceContext(carrier["traceparent"], carrier.get("tracestate", ""))

    def annotate(self, attributes: Attributes) -> None:
        if not self._has_ended:
            self._span.set_attributes(dict(attributes))

    def mark(self, event: str) -> None:
        if not self._has_ended:
            self._span.add_event(event, timestamp=self._clock.now_ns())

    def record_error(self, error: BaseException) -> None:
        if not self._has_ended:
            self._span.set_attribute("error.type", type(error).__name__)
            self._span.set_status(trace.StatusCode.ERROR)

    def record(self, part: SpanPart, attributes: Attributes | None = None) -> None:
        now_ns = self._clock.now_ns()
        start_ns, stop_ns = (
            min(max(self._clock.unix_ns(at_s), self._started_ns), now_ns)
            for at_s in (part.start_s, part.stop_s)
        )
        child = self._tracer.start_span(
            part.name,
            context=trace.set_span_in_context(self._span, Context()),
            start_time=start_ns,
            attributes=dict(attributes or {}),
        )
        child.end(max(start_ns, stop_ns))

    def end(self) -> None:
        if not self._has_ended:
            self._has_ended = True
            self._span.end(self._clock.now_ns())


def _context_of(parent: TraceContext | None) -> Context:
    """Return OpenTelemetry's context; a malformed parent counts as none, as W3C demands."""
    if parent is None:
        return Context()
    carrier = {"traceparent": parent.traceparent, "tracestate": parent.tracestate}
    return _W3C.extract(carrier, Context())


def _exporter_of(protocol: str) -> Callable[[], SpanExporter]:
    """Return the exporter: it reads its endpoint, headers, certificates and so on itself."""
    if protocol == "grpc":
        from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

        return OTLPSpanExporter
    from opentelemetry.exporter.otlp.proto.http import trace_exporter

    return trace_exporter.OTLPSpanExporter
