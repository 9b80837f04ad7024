"""A run in numbers: percentiles, goodput under an SLO, errors by reason, answers' score.

Pure. Latencies count from the scheduled send time, so that a client which falls behind shows
as latency, not as a lower load (coordinated omission); the client's lag is reported as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from ...config import Seconds, Strict
from ..reporting.percentiles import percentiles
from .outcome import RequestEnding, RequestOutcome

PERCENTILES = (50.0, 90.0, 95.0, 99.0)
# Student's t at 97.5 %, by degrees of freedom from 1 on.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_REPLICATES = len(_T) + 1


class RequestSlo(Strict):
    """The bounds of a good request. An absent bound holds always."""

    ttft_s: Seconds | None = None
    tpot_s: Seconds | None = None
    e2e_s: Seconds | None = None

    def is_within_slo(self, outcome: RequestOutcome) -> bool:
        """Return True when the request was answered within every bound."""
        return (
            outcome.stream.ending is RequestEnding.ANSWERED
            and _is_within(outcome.ttft_s, self.ttft_s)
            and _is_within(outcome.tpot_s, self.tpot_s)
            and _is_within(outcome.e2e_s, self.e2e_s)
        )


@dataclass(frozen=True, slots=True)
class Distribution:
    """Seconds (or a plain number) over requests or tokens. All NaN where there are none.

    A percentile is inf where it falls among the requests that never got to what is measured.
    """

    count: int  # of the values that there are
    mean: float  # of the same
    p50: float
    p90: float
    p95: float
    p99: float

    @classmethod
    def from_values(cls, values: Iterable[float | None], never: int = 0) -> Distribution:
        """Summarise the values that are not None; `never` more are later than any."""
        there = np.array([value for value in values if value is not None], dtype=np.float64)
        mean = float(there.mean()) if len(there) else float("nan")
        return cls(len(there), mean, *percentiles(there, never, PERCENTILES))


@dataclass(frozen=True, slots=True)
class Summary:
    """One group of requests."""

    name: str
    requests: int
    seconds: float  # from the first scheduled request to the last end
    offered_qps: float
    goodput_qps: float  # requests within the SLO per second
    attainment: float  # share of the requests that were not cancelled that met the SLO
    endings: dict[str, int]
    errors: dict[str, int]  # by the server's message
    ttft_s: Distribution
    tpot_s: Distribution
    itl_s: Distribution
    e2e_s: Distribution
    lag_s: Distribution
    prompt_tokens: float  # means
    kept_tokens: float
    keep_rate: float
    output_tokens_per_s: float
    score: float  # mean over the answered requests that can be scored
    reasons: dict[str, int]  # the service's plans, `prune: asked` and so on

    @property
    def error_rate(self) -> float:
        """Share of requests that failed or timed out; shed ones are counted apart."""
        bad = self.endings.get(RequestEnding.FAILED, 0) + self.endings.get(
            RequestEnding.TIMED_OUT, 0
        )
        return bad / self.requests


def summarise(name: str, outcomes: Sequence[RequestOutcome], slo: RequestSlo) -> Summary:
    """Summarise a group. Raises ValueError for an empty one."""
    if not outcomes:
        raise ValueError("no request was sent")
    started_s = min(outcome.scheduled_s for outcome in outcomes)
    seconds = max(outcome.scheduled_s + outcome.e2e_s for outcome in outcomes) - started_s
    sent_for_s = max(outcome.scheduled_s for outcome in outcomes) - started_s
    counted = [one for one in outcomes if one.stream.ending is not RequestEnding.CANCELLED]
    good = sum(slo.is_within_slo(outcome) for outcome in counted)
    streams = [outcome.stream for outcome in outcomes]
    return Summary(
        name=name,
        requests=len(outcomes),
        seconds=seconds,
        offered_qps=(len(outcomes) - 1) / sent_for_s if sent_for_s > 0 else float("nan"),
        goodput_qps=good / seconds,
        attainment=good / len(counted) if counted else float("nan"),
        endings=_counts(stream.ending.value for stream in streams),
        errors=_counts(stream.error for stream in streams if stream.error),
        ttft_s=Distribution.from_values(
            (outcome.ttft_s for outcome in counted),
            never=sum(outcome.ttft_s is None for outcome in counted),
        ),
        tpot_s=Distribution.from_values(outcome.tpot_s for outcome in counted),
        itl_s=Distribution.from_values(gap for outcome in counted for gap in outcome.gaps_s),
        e2e_s=Distribution.from_values(
            one.e2e_s for one in counted if one.stream.ending is RequestEnding.ANSWERED
        ),
        lag_s=Distribution.from_values(outcome.lag_s for outcome in outcomes),
        prompt_tokens=_mean(float(one.prompt_tokens) or None for one in streams),
        kept_tokens=_mean(outcome.report_number("kept_tokens") for outcome in outcomes),
        keep_rate=_mean(outcome.report_number("keep_rate") for outcome in outcomes),
        output_tokens_per_s=sum(stream.output_tokens for stream in streams) / seconds,
        score=_mean(outcome.score for outcome in counted),
        reasons=_counts(
            f"{one.report['plan']}: {one.report['reason']}" for one in streams if one.report
        ),
    )


def summarise_groups(
    outcomes: Sequence[RequestOutcome], key: Callable[[RequestOutcome], str], slo: RequestSlo
) -> list[Summary]:
    """Return one summary per value of `key`, in order of first appearance."""
    groups: dict[str, list[RequestOutcome]] = {}
    for outcome in outcomes:
        groups.setdefault(key(outcome), []).append(outcome)
    return [summarise(name, members, slo) for name, members in groups.items()]


@dataclass(frozen=True, slots=True)
class Replicated:
    """A number over replicates: its mean, and half of the width of its 95 % interval.

    Both are NaN where a replicate has no finite number.
    """

    mean: float
    half_width: float

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Replicated:
        """Take 2 to `MOST_REPLICATES` values as independent draws of a normal distribution."""
        drawn = np.asarray(values, dtype=np.float64)
        if not np.isfinite(drawn).all():
            return cls(float("nan"), float("nan"))
        error = float(drawn.std(ddof=1)) / len(drawn) ** 0.5
        return cls(float(drawn.mean()), _T[len(drawn) - 2] * error)


def _is_within(value: float | None, bound: float | None) -> bool:
    return bound is None or value is None or value <= bound


def _counts(values: Iterable[str]) -> dict[str, int]:
    return dict(Counter(values).most_common())


def _mean(values: Iterable[float | None]) -> float:
    return Distribution.from_values(values).mean
