"""A tracer whose spans can be read, and what must hold of any trace."""

from __future__ import annotations

from dataclasses import dataclass

from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from specprefill.tracing.otel import OtelTracer


@dataclass(frozen=True)
class Span:
    """One exported span; ids in hex, times in nanoseconds."""

    name: str
    trace: str
    id: str
    parent: str  # empty: a root
    start: int
    end: int
    attributes: dict
    process: str = ""
    failed: bool = False


class RecordedTraces:
    """`tracer`, and the spans that it has exported."""

    def __init__(self, role="gateway"):
        self._exporter = InMemorySpanExporter()
        self.tracer = OtelTracer(role, processor=SimpleSpanProcessor(self._exporter))

    def spans(self) -> dict[str, Span]:
        """By name; each name occurs once."""
        found = self.all()
        by_name = {span.name: span for span in found}
        assert len(by_name) == len(found)
        return by_name

    def all(self) -> list[Span]:
        """In the order of their ends."""
        return [_read(each) for each in self._exporter.get_finished_spans()]


def _read(span) -> Span:
    return Span(
        span.name,
        f"{span.context.trace_id:032x}",
        f"{span.context.span_id:016x}",
        "" if span.parent is None else f"{span.parent.span_id:016x}",
        span.start_time,
        span.end_time,
        dict(span.attributes),
        span.resource.attributes["service.instance.id"],
        failed=not span.status.is_ok and span.status.status_code.name == "ERROR",
    )


def check_nesting(spans, slack_ns=0):
    """One trace; each parent is there and surrounds its children."""
    spans = list(spans)
    assert len({span.trace for span in spans}) == 1
    by_id = {span.id: span for span in spans}
    for span in spans:
        assert span.start <= span.end, span
        if span.parent in by_id:
            parent = by_id[span.parent]
            assert parent.start - slack_ns <= span.start, (parent, span)
            assert span.end <= parent.end + slack_ns, (parent, span)
    return by_id
