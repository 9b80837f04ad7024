"""Prometheus metrics of the pipeline, around it: the pipeline itself knows none of this.

They stand beside the HTTP metrics of vLLM's server on `/metrics`; names end in their unit.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing

from prometheus_client import Counter, Histogram

from ..errors import Overloaded, SpecPrefillError
from ..gate import AdmittingPipeline
from ..pipeline import Pipeline
from ..plan import Planner
from ..types import Chunk, Report, Request, Selection

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 8)
_RATES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)

REQUESTS = Counter(
    "specprefill_requests_total", "Requests by how they ended", ["outcome", "plan", "reason"]
)
PROMPT_TOKENS = Counter("specprefill_prompt_tokens_total", "Prompt tokens that callers sent")
KEPT_TOKENS = Counter("specprefill_kept_tokens_total", "Prompt tokens that were prefilled")
RECOMPUTED = Counter(
    "specprefill_recomputed_total", "Requests whose KV was computed again by decode"
)
PREFILLED = Counter(
    "specprefill_prefilled_total", "Prompts by the pool that computed them", ["pool"]
)
TTFT = Histogram(
    "specprefill_time_to_first_token_seconds", "Until the first token", ["plan"], buckets=_SECONDS
)
STAGE = Histogram("specprefill_stage_seconds", "Time in a stage", ["stage"], buckets=_SECONDS)
KEEP_RATE = Histogram("specprefill_keep_rate", "Kept share of pruned prompts", buckets=_RATES)
TTFT_FORESEEN = Histogram(
    "specprefill_time_to_first_token_ratio",
    "Time to first token over what the plan was decided on",
    ["plan"],
    buckets=_RATIOS,
)
SHED = Counter("specprefill_shed_total", "Requests refused under load", ["reason"])
ENDED, CLOSED = "answered", "client_closed"


Learn = Callable[[Request, Report], None]


class MeasuredPipeline:
    """A pipeline that counts. It answers exactly what the pipeline inside answers.

    `learn` is told of every finished request.
    """

    def __init__(self, pipeline: Pipeline | AdmittingPipeline, learn: Learn | None = None) -> None:
        self._pipeline = pipeline
        self._learn = learn
        self.planner: Planner = pipeline.planner

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See Pipeline.generate."""
        report: Report | None = None
        outcome = CLOSED
        try:
            async with aclosing(self._pipeline.generate(request)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    report = chunk.report
                    yield chunk
            outcome = ENDED
        except SpecPrefillError as error:
            outcome = type(error).__name__
            if isinstance(error, Overloaded):
                SHED.labels(error.reason).inc()
            raise
        finally:
            # The consumer may close the stream right after the last chunk: that is no abort.
            _count(request, ENDED if report is not None else outcome, report)
            if report is not None and self._learn is not None:
                self._learn(request, report)

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self._pipeline.select(request)


def count_shed(reason: str) -> None:
    """Count a request that was refused before it came to the pipeline."""
    SHED.labels(reason).inc()


def _count(request: Request, outcome: str, report: Report | None) -> None:
    PROMPT_TOKENS.inc(len(request.prompt))
    if report is None:
        REQUESTS.labels(outcome, "", "").inc()
        return
    REQUESTS.labels(outcome, report.plan, report.reason).inc()
    KEPT_TOKENS.inc(report.kept_tokens)
    RECOMPUTED.inc(report.recomputed)
    PREFILLED.labels(report.prefilled_by).inc()
    TTFT.labels(report.plan).observe(report.ttft_s)
    if report.expected is not None:
        foreseen_s = report.expected.of(report.plan)
        TTFT_FORESEEN.labels(report.plan).observe(report.ttft_s / foreseen_s)
    if report.kept_tokens < report.prompt_tokens:
        KEEP_RATE.observe(report.keep_rate)
    for stage, seconds in (
        ("queue", report.queue_s),
        ("speculate", report.speculate_s),
        ("prefill", report.prefill_s),
        ("transfer", report.transfer_s),
        ("first_decode", report.first_decode_s),
    ):
        STAGE.labels(stage).observe(seconds)
