"""Spans as OpenTelemetry exports them."""

import os
import threading
import time

import pytest

from specprefill.core.request_spans import (
    NoTracer,
    SpanKind,
    SpanPart,
    TraceContext,
    consecutive_parts,
)
from specprefill.tracing.environment import tracer_for
from tests.spans import RecordedTraces, check_nesting

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CALLER = TraceContext(f"00-{TRACE}-{PARENT}-01", "vendor=1")


def test_a_span_continues_the_callers_trace():
    traces = RecordedTraces()
    with traces.tracer.start("call", CALLER, SpanKind.SERVER) as span:
        context = span.context
    (call,) = traces.spans().values()
    assert (call.trace, call.parent) == (TRACE, PARENT)
    assert context == TraceContext(f"00-{TRACE}-{call.id}-01", "vendor=1")


@pytest.mark.parametrize("traceparent", ["", "00-zz-zz-01", f"00-{TRACE}-{PARENT}", "nonsense"])
def test_a_malformed_parent_counts_as_none(traceparent):
    traces = RecordedTraces()
    with traces.tracer.start("call", TraceContext(traceparent), SpanKind.SERVER):
        pass
    (call,) = traces.spans().values()
    assert call.parent == ""
    assert call.trace != TRACE


def test_what_a_caller_does_not_sample_is_not_recorded():
    traces = RecordedTraces()
    with traces.tracer.start(
        "call", TraceContext(f"00-{TRACE}-{PARENT}-00"), SpanKind.SERVER
    ) as span:
        assert span.context is None  # so that nothing below it is recorded either
    assert traces.spans() == {}


def test_without_a_parent_nothing_is_recorded_within():
    traces = RecordedTraces()
    with traces.tracer.start_within("stage", None) as span:
        span.annotate({"a": 1})
    assert traces.spans() == {}


def test_stages_lie_within_their_span():
    traces = RecordedTraces()
    with traces.tracer.start("call", CALLER, SpanKind.SERVER) as span:
        started_s = time.monotonic()
        for stage in consecutive_parts(started_s - 5.0, ("too_early", 1.0), ("too_late", 60.0)):
            span.record(stage, {"tokens": 3})
    spans = traces.spans()
    check_nesting(spans.values())
    assert spans["too_late"].parent == spans["call"].id
    assert spans["too_late"].attributes == {"tokens": 3}


def test_a_stage_keeps_its_times():
    traces = RecordedTraces()
    with traces.tracer.start("call", None, SpanKind.SERVER) as span:
        start_s = time.monotonic()
        while time.monotonic() < start_s + 0.02:
            pass
        span.record(SpanPart("stage", start_s, start_s + 0.01))
    stage = traces.spans()["stage"]
    assert (stage.end - stage.start) / 1e9 == pytest.approx(0.01, abs=1e-6)


def test_a_failure_is_named_without_its_message():
    traces = RecordedTraces()
    with (
        pytest.raises(ValueError, match="secret"),
        traces.tracer.start("call", None, SpanKind.SERVER),
    ):
        raise ValueError("a secret prompt")
    (call,) = traces.spans().values()
    assert call.failed
    assert call.attributes == {"error.type": "ValueError"}


def test_an_ended_span_takes_nothing_more():
    traces = RecordedTraces()
    with traces.tracer.start("call", None, SpanKind.SERVER) as span:
        span.end()
        ended_ns = time.time_ns()
        span.annotate({"late": 1})
        span.record_error(ValueError())
        span.mark("late")
    (call,) = traces.spans().values()
    assert call.attributes == {}
    assert not call.failed
    assert call.end <= ended_ns + 1_000_000


def test_no_tracer_has_no_context_to_hand_on():
    with NoTracer().start("call", CALLER, SpanKind.SERVER) as span:
        assert span.context is None


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_the_exporter_begins_with_the_first_span(monkeypatch, protocol):
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    before = {thread.name for thread in threading.enumerate()}
    tracer = tracer_for("prefill", {**os.environ, "OTEL_EXPORTER_OTLP_PROTOCOL": protocol})
    with tracer.start_within("stage", None):
        pass
    assert tracer.is_on
    assert {thread.name for thread in threading.enumerate()} == before
