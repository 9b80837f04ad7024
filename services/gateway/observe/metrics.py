"""Metrics of the pipeline, from outside: the pipeline itself knows none of this.

They are Ray's (`ray_specprefill_*`), so that one scrape sees every gateway.
"""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from ...core.errors import Overloaded
from ...core.types import Chunk, PlanKind, Report, Request
from .watched import Ending, Observer, RequestObserver

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 8)
_RATES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
ENDED, CLOSED = "answered", "client_closed"


class PipelineMetrics:
    """One gateway's counters. `make` has `Counter` and `Histogram`, as `ray.serve.metrics` has."""

    def __init__(self, make: Any = metrics) -> None:
        def counter(name: str, description: str, *tags: str) -> Any:
            return make.Counter(f"specprefill_{name}", description=description, tag_keys=tags)

        def histogram(name: str, description: str, bounds: tuple[float, ...], *tags: str) -> Any:
            return make.Histogram(
                f"specprefill_{name}", description=description, boundaries=bounds, tag_keys=tags
            )

        self._requests = counter(
            "requests_total",
            "Requests by their end: `answered`, `client_closed`, or the error's name",
            "outcome",
            "plan",
            "reason",
        )
        self._prompt_tokens = counter("prompt_tokens_total", "Prompt tokens that callers sent")
        self._kept_tokens = counter("kept_tokens_total", "Prompt tokens that were kept")
        self._saved_tokens = counter(
            "saved_tokens_total", "Prompt tokens of answered requests that were not kept"
        )
        self._modes = counter(
            "prompts_total",
            "Prompts by the form in which the main model got them: `positions`, `text`, `dense`",
            "mode",
        )
        self._output_tokens = counter("output_tokens_total", "Tokens of answers, sent to clients")
        self._prefilled = counter(
            "prefilled_total", "Prompts by the pool that computed them: `prefill`, `decode`", "pool"
        )
        self._recomputed = counter(
            "recomputed_total", "Requests whose KV the decode engine computed again"
        )
        self._retries = counter(
            "retries_total", "Replicas that were lost under an answered request, which went on"
        )
        self._shed = counter(
            "shed_total", "Requests refused under load; [reasons](api.md#errors)", "reason"
        )
        self._ttft = histogram(
            "time_to_first_token_seconds",
            "Until the first token left the pipeline, of answered requests",
            _SECONDS,
            "plan",
        )
        self._stage = histogram(
            "stage_seconds",
            "Time in a stage: `queue`, `speculate`, `prefill`, `transfer`, `first_decode`, "
            "`discarded`",
            _SECONDS,
            "stage",
        )
        self._keep_rate = histogram("keep_rate", "Kept share of pruned prompts", _RATES)
        self._ttft_foreseen = histogram(
            "time_to_first_token_ratio",
            "Measured over expected time to first token, without waiting in queues; far from 1, "
            "the stage models are wrong",
            _RATIOS,
            "plan",
        )

    def count_shed(self, reason: str) -> None:
        """Count a request that was refused under load before the pipeline got it."""
        self.count_shed_reason(reason)
        self._requests.inc(1, {"outcome": Overloaded.__name__, "plan": "", "reason": ""})

    def count_shed_reason(self, reason: str) -> None:
        """Count why a request was refused under load; `count_request` counts the request."""
        self._shed.inc(1, {"reason": reason})

    def count_request(
        self, request: Request, outcome: str, report: Report | None, output_tokens: int = 0
    ) -> None:
        """Count a request; `report` None: it has no answer."""
        _add(self._prompt_tokens, len(request.prompt))
        _add(self._output_tokens, output_tokens)
        if report is None:
            self._requests.inc(1, {"outcome": outcome, "plan": "", "reason": ""})
            return
        plan, reason = report.plan.value, report.reason.value
        self._requests.inc(1, {"outcome": outcome, "plan": plan, "reason": reason})
        _add(self._kept_tokens, report.kept_tokens)
        _add(self._saved_tokens, report.prompt_tokens - report.kept_tokens)
        self._modes.inc(1, {"mode": report.mode.value})
        if report.recomputed:
            self._recomputed.inc(1)
        _add(self._retries, report.retries)
        self._prefilled.inc(1, {"pool": report.prefilled_by.value})
        self._observe_times(report)
        if report.kept_tokens < report.prompt_tokens:
            self._keep_rate.observe(report.keep_rate)

    def _observe_times(self, report: Report) -> None:
        plan = {"plan": report.plan.value}
        self._ttft.observe(report.ttft_s, plan)
        if report.expected is not None:
            ttft_s = report.ttft_s - report.queue_s - report.discarded_s
            if report.plan is PlanKind.DENSE:  # it is foreseen without a speculator
                ttft_s -= report.speculate_s
            self._ttft_foreseen.observe(ttft_s / report.expected.for_plan(report.plan), plan)
        for stage, seconds in (
            ("queue", report.queue_s),
            ("speculate", report.speculate_s),
            ("prefill", report.prefill_s),
            ("transfer", report.transfer_s),
            ("first_decode", report.first_decode_s),
            ("discarded", report.discarded_s),
        ):
            self._stage.observe(seconds, {"stage": stage})


class RequestMetrics(Observer):
    """Counts every request of a gateway."""

    def __init__(self, metrics: PipelineMetrics) -> None:
        self._metrics = metrics

    def on_arrival(self, request: Request) -> RequestObserver:
        """See Observer."""
        return _RequestMetrics(request, self._metrics)

    def on_shed_selection(self, error: Overloaded) -> None:
        """See Observer."""
        self._metrics.count_shed_reason(error.reason)


class _RequestMetrics(RequestObserver):
    def __init__(self, request: Request, metrics: PipelineMetrics) -> None:
        self._request = request
        self._metrics = metrics
        self._output_tokens = 0

    def on_chunk(self, chunk: Chunk) -> None:
        self._output_tokens += len(chunk.token_ids)

    def on_end(self, ending: Ending) -> None:
        if isinstance(ending.error, Overloaded):
            self._metrics.count_shed_reason(ending.error.reason)
        self._metrics.count_request(
            self._request, _outcome(ending), ending.report, self._output_tokens
        )


def _outcome(ending: Ending) -> str:
    if ending.report is not None or ending.is_exhausted:
        return ENDED
    return CLOSED if ending.error is None else type(ending.error).__name__


def _add(counter: Any, value: int) -> None:
    """Add to a counter, which takes no zero."""
    if value > 0:
        counter.inc(value)
