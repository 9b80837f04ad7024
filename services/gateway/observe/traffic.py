"""A gateway's signals to the autoscaler: arrivals by size, and answer times.

Arrivals are counted when they come, not when they are answered: requests that wait behind a full
pool are demand too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

from ...autoscaling.signals import (
    CACHED_SHARE,
    OUTPUT_TOKEN_S,
    REMEMBERED_SHARE,
    Size,
    arrival_signals,
    curve_signals,
    size,
)
from ...control.gain import TYPICAL_KEEP
from ...control.stages import StageCurves
from ...core.plan import plan_of
from ...core.selection import SelectionPolicy, expected_kept
from ...core.types import UNSCORED, Chunk, PlanKind, Reason, Report, Request
from .watched import Observer, RequestObserver

_NEWEST = 1 / 32  # weight of the newest answer in the averages
_OUTPUT_TOKENS, _OUTPUT_TOKEN_S = 128.0, 0.03  # the averages before the first answer


class GatewayTraffic:
    """Counts and averages of one gateway."""

    def __init__(self) -> None:
        self._arrivals: Counter[Size] = Counter()
        self._output_tokens = _OUTPUT_TOKENS
        self._output_token_s = _OUTPUT_TOKEN_S
        self._cached_share = 0.0
        self._remembered_share = 0.0
        self.keep_rate = TYPICAL_KEEP  # usual for pruned prompts
        self.unsure_share = 0.0  # of pruned prompts: those prefilled again, dense

    def count_arrival(self, prompt_tokens: int, kept_tokens: int) -> None:
        """Count a request; `kept_tokens` at the nominal keep rate."""
        self._arrivals[size(prompt_tokens, kept_tokens, self._output_tokens)] += 1

    def record_answer(
        self, report: Report, output_tokens: int, decode_s: float, samples: int = 1
    ) -> None:
        """Learn from an answer whose last token came `decode_s` after its first.

        `output_tokens` are those of all samples, each of which has a decode slot meanwhile.
        """
        cached = report.cached_tokens / report.engine_tokens
        self._cached_share += _NEWEST * (cached - self._cached_share)
        if report.speculate_s > 0.0 and report.reason not in UNSCORED:
            remembered = report.remembered_tokens / report.prompt_tokens
            self._remembered_share += _NEWEST * (remembered - self._remembered_share)
        is_unsure = report.reason is Reason.UNSURE_ANSWER
        if is_unsure or report.plan is PlanKind.PRUNE:
            self.unsure_share += _NEWEST * (is_unsure - self.unsure_share)
        if report.plan is PlanKind.PRUNE:
            self.keep_rate += _NEWEST * (report.keep_rate - self.keep_rate)
        self._output_tokens += _NEWEST * (output_tokens - self._output_tokens)
        if output_tokens > samples:
            token_s = decode_s * samples / (output_tokens - samples)
            self._output_token_s += _NEWEST * (token_s - self._output_token_s)

    def signals(self, curves: StageCurves) -> dict[str, float]:
        """Return the signals for `record_autoscaling_stats`."""
        return {
            **arrival_signals(self._arrivals),
            **curve_signals(curves),
            OUTPUT_TOKEN_S: self._output_token_s,
            CACHED_SHARE: self._cached_share,
            REMEMBERED_SHARE: self._remembered_share,
        }


class ArrivalCounts(Observer):
    """Reports every request of a gateway to `traffic`."""

    def __init__(
        self, traffic: GatewayTraffic, policy: SelectionPolicy, now: Callable[[], float]
    ) -> None:
        self._traffic = traffic
        self._policy = policy
        self._now = now

    def on_arrival(self, request: Request) -> RequestObserver:
        """See Observer."""
        self._traffic.count_arrival(len(request.prompt), self._expected_kept_tokens(request))
        return _AnswerTimes(self._traffic, self._now, request.samples)

    def _expected_kept_tokens(self, request: Request) -> int:
        plan, tokens = plan_of(request), len(request.prompt)
        if plan.kind is PlanKind.DENSE:
            return tokens
        keep = plan.keep if plan.within is None else self._traffic.keep_rate  # the scores choose
        kept = expected_kept(tokens, keep, request.protected, self._policy)
        again = round(self._traffic.unsure_share * tokens)
        return min(kept + again, max(kept, tokens - 1))  # as many as it has: it would be dense


class _AnswerTimes(RequestObserver):
    def __init__(self, traffic: GatewayTraffic, now: Callable[[], float], samples: int) -> None:
        self._traffic = traffic
        self._now = now
        self._samples = samples
        self._tokens = 0
        self._first_s: float | None = None

    def on_chunk(self, chunk: Chunk) -> None:
        self._first_s = self._now() if self._first_s is None else self._first_s
        self._tokens += len(chunk.token_ids)
        if chunk.report is not None:
            decode_s = self._now() - self._first_s
            self._traffic.record_answer(chunk.report, self._tokens, decode_s, self._samples)
