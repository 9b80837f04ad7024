"""Spans of a request, as every pool records them. Knows no tracing library.

A span's parent travels with the request (`Request.trace`), never through a global: prompts of one
HTTP request run at the same time. Times are `time.monotonic()`.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Protocol

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True, slots=True)
class TraceContext:
    """A span that others may have as their parent, as W3C Trace Context writes it."""

    traceparent: str
    tracestate: str = ""


class SpanKind(enum.Enum):
    """The side of a call that a span describes."""

    SERVER = "server"
    CLIENT = "client"
    INTERNAL = "internal"


@dataclass(frozen=True, slots=True)
class SpanPart:
    """A part of a span that is known once it is over; seconds of `time.monotonic()`."""

    name: str
    start_s: float
    stop_s: float


def consecutive_parts(start_s: float, *stages: tuple[str, float]) -> list[SpanPart]:
    """Return stages that follow each other from `start_s`, given by name and seconds."""
    found = []
    for name, seconds in stages:
        found.append(SpanPart(name, start_s, start_s + seconds))
        start_s += seconds
    return found


class OpenSpan(Protocol):
    """A span that has started."""

    @property
    def context(self) -> TraceContext | None:
        """The parent for spans within this one; None: nobody records them."""
        ...

    def annotate(self, attributes: Attributes) -> None:
        """Add attributes. Never a part of a prompt or an answer."""
        ...

    def mark(self, event: str) -> None:
        """Record that `event` happens now."""
        ...

    def record_error(self, error: BaseException) -> None:
        """Mark the span as failed, by the error's type: its message may quote the prompt."""
        ...

    def record(self, part: SpanPart, attributes: Attributes | None = None) -> None:
        """Record a child that is over. It is cut to this span."""
        ...

    def end(self) -> None:
        """End the span before its `with` block does. Idempotent."""
        ...


class Tracer(Protocol):
    """Starts spans."""

    @property
    def is_on(self) -> bool:
        """False where nothing is ever recorded."""
        ...

    def start(
        self, name: str, parent: TraceContext | None, kind: SpanKind
    ) -> AbstractContextManager[OpenSpan]:
        """Record a span while inside; an exception marks it as failed. `parent` None: a root."""
        ...

    def start_within(
        self, name: str, parent: TraceContext | None, kind: SpanKind = SpanKind.INTERNAL
    ) -> AbstractContextManager[OpenSpan]:
        """Record a span below `parent`; nothing where `parent` is None."""
        ...


class NoSpan:
    """Records nothing."""

    context: TraceContext | None = None

    def annotate(self, attributes: Attributes) -> None:
        """See OpenSpan."""

    def mark(self, event: str) -> None:
        """See OpenSpan."""

    def record_error(self, error: BaseException) -> None:
        """See OpenSpan."""

    def record(self, part: SpanPart, attributes: Attributes | None = None) -> None:
        """See OpenSpan."""

    def end(self) -> None:
        """See OpenSpan."""


_NO_SPAN = NoSpan()


class NoTracer:
    """Traces nothing: tracing is off."""

    is_on = False

    def start(
        self, name: str, parent: TraceContext | None, kind: SpanKind
    ) -> AbstractContextManager[OpenSpan]:
        """See Tracer."""
        del name, parent, kind
        return nullcontext(_NO_SPAN)

    def start_within(
        self, name: str, parent: TraceContext | None, kind: SpanKind = SpanKind.INTERNAL
    ) -> AbstractContextManager[OpenSpan]:
        """See Tracer."""
        del name, parent, kind
        return nullcontext(_NO_SPAN)
