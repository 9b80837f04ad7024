"""An OTLP collector: OpenTelemetry's own service, over gRPC, that keeps the spans it gets."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as messages
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc as service

from tests.spans import Span

_ERROR = 2  # of opentelemetry.proto.trace.v1.Status


class Collector(service.TraceServiceServicer):
    """Spans by trace id, as they arrive."""

    def __init__(self) -> None:
        self._arrival = threading.Condition()
        self._spans: list[Span] = []
        self._server = grpc.server(ThreadPoolExecutor(4))
        service.add_TraceServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port("127.0.0.1:0")

    def __enter__(self) -> Collector:
        self._server.start()
        return self

    def __exit__(self, *_exc) -> None:
        self._server.stop(grace=None).wait()

    def Export(self, request, context):
        """See OTLP."""
        found = [
            _read(span, resource.resource)
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]
        with self._arrival:
            self._spans += found
            self._arrival.notify_all()
        return messages.ExportTraceServiceResponse()

    def wait_for(self, is_whole: Callable[[list[Span]], bool], trace: str, timeout_s=30) -> list:
        """The spans of a trace, once `is_whole` is true of them."""
        give_up_s = time.monotonic() + timeout_s
        with self._arrival:
            while not is_whole(found := self.trace(trace)):
                left_s = give_up_s - time.monotonic()
                assert left_s > 0, sorted(span.name for span in found)
                self._arrival.wait(left_s)
            return found

    def trace(self, trace: str) -> list[Span]:
        """The spans of a trace so far."""
        return [span for span in self._spans if span.trace == trace]

    @property
    def spans(self) -> list[Span]:
        """All spans so far."""
        return list(self._spans)


def _read(span, resource) -> Span:
    return Span(
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _attributes(span.attributes),
        _attributes(resource.attributes)["service.instance.id"],
        failed=span.status.code == _ERROR,
    )


def _attributes(pairs) -> dict:
    return {pair.key: getattr(pair.value, pair.value.WhichOneof("value")) for pair in pairs}
