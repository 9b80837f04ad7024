"""Spans of a gateway: one for each prompt, and one for each call to a pool.

These wrap the pipeline and its ports where tracing is on; the pipeline knows nothing of them. A
call's span ends with the call's last value, not when its stream is closed: the replica's own span
lies within it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from ...core.plan import plan_of
from ...core.ports import Answerer, Decoder, Prefiller, Prefilling, Speculator
from ...core.request_spans import Attributes, OpenSpan, SpanKind, Tracer
from ...core.types import (
    Chunk,
    DecodeStep,
    Plan,
    PrefillResult,
    Replay,
    Report,
    Request,
    Selection,
    Ticket,
)


@dataclass(frozen=True, slots=True)
class TracedPools:
    """Wraps the pipeline and its ports; where tracing is off, each is returned as it is."""

    tracer: Tracer

    def pipeline(self, inner: Answerer) -> Answerer:
        """Return `inner` with a span per prompt."""
        return TracedPipeline(inner, self.tracer) if self.tracer.is_on else inner

    def speculator(self, inner: Speculator) -> Speculator:
        """Return `inner` with a span per call."""
        return TracedSpeculator(inner, self.tracer) if self.tracer.is_on else inner

    def prefiller(self, inner: Prefiller) -> Prefiller:
        """Return `inner` with a span per call."""
        return TracedPrefiller(inner, self.tracer) if self.tracer.is_on else inner

    def decoder(self, inner: Decoder) -> Decoder:
        """Return `inner` with a span per call."""
        return TracedDecoder(inner, self.tracer) if self.tracer.is_on else inner


@dataclass(frozen=True, slots=True)
class TracedPipeline:
    """Records a span per prompt, from its plan to its last token."""

    inner: Answerer
    tracer: Tracer

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """See Pipeline.generate."""
        with self.tracer.start_within("answer", request.trace) as span:
            span.annotate(_request_attributes(request))
            has_started, output_tokens = False, 0
            inside = replace(request, trace=span.context)
            async with aclosing(self.inner.generate(inside)) as chunks:
                async for chunk in chunks:
                    if not has_started:
                        has_started = True
                        span.mark("first_token")
                    output_tokens += len(chunk.token_ids)
                    if chunk.report is not None:
                        span.annotate(_report_attributes(chunk.report, output_tokens))
                        span.end()
                    yield chunk

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        with self.tracer.start_within("select", request.trace) as span:
            span.annotate(_request_attributes(request))
            return await self.inner.select(replace(request, trace=span.context))


@dataclass(frozen=True, slots=True)
class TracedSpeculator:
    """Records a span per call of a speculator."""

    inner: Speculator
    tracer: Tracer

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See the port."""
        with self.tracer.start_within("speculate", request.trace, SpanKind.CLIENT) as span:
            inside = replace(request, trace=span.context)
            selection = await self.inner.select(inside, plan, timeout_s)
            span.annotate(_selection_attributes(selection))
            return selection


@dataclass(frozen=True, slots=True)
class TracedPrefiller:
    """Records a span per prefill, until its first token."""

    inner: Prefiller
    tracer: Tracer

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilling]:
        """See the port."""
        with self.tracer.start_within("prefill", request.trace, SpanKind.CLIENT) as span:
            inside = replace(request, trace=span.context)
            async with self.inner.prefill(inside, selection, timeout_s) as prefilling:
                yield _TracedPrefilling(prefilling, span)


@dataclass(frozen=True, slots=True)
class _TracedPrefilling:
    inner: Prefilling
    span: OpenSpan

    async def ticket(self) -> Ticket | None:
        ticket = await self.inner.ticket()
        if ticket is not None:
            self.span.mark("early_ticket")
        return ticket

    async def result(self) -> PrefillResult:
        result = await self.inner.result()
        self.span.annotate({"specprefill.cached_tokens": result.first.cached_tokens})
        self.span.end()
        return result

    def kv_arrived(self) -> None:
        self.inner.kv_arrived()


@dataclass(frozen=True, slots=True)
class TracedDecoder:
    """Records a span per call of a decode engine."""

    inner: Decoder
    tracer: Tracer

    async def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep]:
        """See the port."""
        with self.tracer.start_within("decode", request.trace, SpanKind.CLIENT) as span:
            inside = replace(request, trace=span.context)
            open_samples = request.samples
            steps = self.inner.decode(inside, selection, ticket, replay, timeout_s)
            async with aclosing(steps) as stream:
                async for step in stream:
                    open_samples -= step.chunk.is_finished
                    if open_samples == 0:
                        span.end()
                    yield step


def _request_attributes(request: Request) -> Attributes:
    plan = plan_of(request)
    return {
        "specprefill.request_id": request.request_id,
        "gen_ai.usage.input_tokens": len(request.prompt),
        "specprefill.plan": plan.kind.value,
        "specprefill.reason": plan.reason.value,
        "specprefill.planned_keep_rate": plan.highest_keep,
    }


def _selection_attributes(selection: Selection) -> Attributes:
    return {
        "specprefill.reason": selection.plan.reason.value,
        "specprefill.kept_tokens": selection.kept_tokens,
        "specprefill.keep_rate": selection.keep_rate,
        "specprefill.remembered_tokens": selection.remembered_tokens,
    }


def _report_attributes(report: Report, output_tokens: int) -> Attributes:
    return {
        "gen_ai.usage.output_tokens": output_tokens,
        "specprefill.plan": report.plan.value,
        "specprefill.reason": report.reason.value,
        "specprefill.kept_tokens": report.kept_tokens,
        "specprefill.keep_rate": report.keep_rate,
        "specprefill.prefilled_by": report.prefilled_by.value,
        "specprefill.recomputed": report.recomputed,
        "specprefill.retries": report.retries,
        "specprefill.ttft_s": report.ttft_s,
    }
