"""A pipeline behind admission control."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Protocol

from msgspec import structs

from ..core.pipeline import Pipeline
from ..core.plan import plan_of
from ..core.request_spans import NoTracer, Tracer
from ..core.types import Chunk, Plan, Request, Selection
from .request_summary import RequestSummary


class Slot(Protocol):
    """A place before the first token, which one request holds."""

    @property
    def plan(self) -> Plan:
        """The plan to serve the request with."""
        ...

    @property
    def waited_s(self) -> float:
        """The seconds that the request waited for the slot."""
        ...

    def record_first_token(self, *, by_itself: bool = False) -> None:
        """Release the slot: the first token is there. Idempotent. `by_itself`: see `Chunk`."""
        ...

    def release(self) -> None:
        """Note the request's end, with or without a first token. Idempotent."""
        ...


class AdmissionGate(Protocol):
    """Decides which requests run, in which order, with which plan."""

    @property
    def waiting(self) -> int:
        """The number of this gateway's requests that wait."""
        ...

    @property
    def running(self) -> int:
        """The number of this gateway's admitted requests without a first token."""
        ...

    @property
    def is_shared(self) -> bool:
        """True while one gate decides for all gateways."""
        ...

    async def enter(self, arrival: RequestSummary) -> Slot:
        """Wait for a slot. Raises Overloaded with a reason, or DeadlineExceeded."""
        ...


class AdmittingPipeline:
    """A pipeline behind a gate. The wait for a slot counts in the report."""

    def __init__(
        self,
        pipeline: Pipeline,
        gate: AdmissionGate,
        keep_floor: float,
        tracer: Tracer | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._gate = gate
        self._keep_floor = keep_floor
        self._tracer = NoTracer() if tracer is None else tracer

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See Pipeline.generate. Raises Overloaded at once, when the request is shed."""
        arrival = RequestSummary.of(request, plan_of(request), self._keep_floor)
        with self._tracer.start_within("admission", request.trace):
            slot = await self._gate.enter(arrival)
        try:
            async with aclosing(self._pipeline.generate(_bounded(request, slot))) as chunks:
                async for chunk in chunks:
                    slot.record_first_token(by_itself=chunk.late_by_itself)
                    yield _add_wait(chunk, slot.waited_s)
        finally:
            slot.release()

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select. It is admitted as an answer is; no prefill engine works for it."""
        slot = await self._gate.enter(
            RequestSummary.of(request, plan_of(request), self._keep_floor, is_prefilled=False)
        )
        try:
            selection = await self._pipeline.select(_bounded(request, slot))
        finally:
            slot.release()
        return replace(selection, queue_s=selection.queue_s + slot.waited_s)


def _bounded(request: Request, slot: Slot) -> Request:
    """Return the request with the slot's plan and the time that is left."""
    left_s = max(0.0, request.timeout_s - slot.waited_s)
    return replace(request, plan=slot.plan, timeout_s=left_s)


def _add_wait(chunk: Chunk, waited_s: float) -> Chunk:
    report = chunk.report
    if report is None or waited_s == 0.0:
        return chunk
    waited = replace(report, queue_s=report.queue_s + waited_s, ttft_s=report.ttft_s + waited_s)
    return structs.replace(chunk, report=waited)
