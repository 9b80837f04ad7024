"""One simulation in one row: first tokens in time, and the replica-hours they took."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np

from ...control.scaling.values import Pool, Slo
from ..reporting.percentiles import percentiles
from .world import SimulationResult

HEADERS = (
    "controller", "attainment", "goodput /s", "replica-hours", "speculator", "prefill", "decode",
    "mean keep", "p50 TTFT s", "p95 TTFT s", "shed", "unanswered",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Score:
    """A controller's result on a trace."""

    controller: str
    requests: int
    attainment: float  # share of all requests whose first two tokens came in time
    goodput_per_s: float  # such requests per second
    replica_hours: float
    pool_hours: dict[str, float]
    mean_keep: float | None  # of the pruned prompts that were answered
    p50_ttft_s: float | None  # of all requests; None: it falls among those without a first token
    p95_ttft_s: float | None
    shed: int
    unanswered: int  # gave up waiting; the shed ones not among them

    def row(self) -> list[str]:
        """Return the cells under `HEADERS`."""
        hours = [f"{self.pool_hours[pool.value]:.1f}" for pool in Pool]
        return [
            self.controller,
            f"{self.attainment:.4f}",
            f"{self.goodput_per_s:.2f}",
            f"{self.replica_hours:.1f}",
            *hours,
            *(_number(each) for each in (self.mean_keep, self.p50_ttft_s, self.p95_ttft_s)),
            str(self.shed),
            str(self.unanswered),
        ]


def score(controller: str, outcome: SimulationResult, slo: Slo, duration_s: float) -> Score:
    """Judge an outcome."""
    met = outcome.meets_slo(slo)
    answered = ~np.isnan(outcome.ttft_s)
    keeps = outcome.keep[answered & (outcome.keep < 1.0)]
    p50_s, p95_s = percentiles(outcome.ttft_s[answered], int((~answered).sum()), (50.0, 95.0))
    hours = {pool.value: outcome.replica_s[pool] / 3600 for pool in Pool}
    shed = int(outcome.shed.sum())
    return Score(
        controller,
        len(met),
        float(met.mean()),
        float(met.sum()) / max(duration_s, 1e-9),
        sum(hours.values()),
        hours,
        float(keeps.mean()) if len(keeps) > 0 else None,
        p50_s if isfinite(p50_s) else None,
        p95_s if isfinite(p95_s) else None,
        shed,
        len(met) - shed - int(answered.sum()),
    )


def attainment_over_time(
    outcome: SimulationResult, time_s: Sequence[float], slo: Slo, every_s: float
) -> tuple[list[float], list[float]]:
    """Return hours, and the share of the requests of each `every_s` that met the SLO."""
    edges = np.arange(0.0, max(time_s, default=0.0) + every_s, every_s)
    place = np.digitize(np.asarray(time_s), edges) - 1
    counts = np.bincount(place, minlength=len(edges))
    met = np.bincount(place, weights=outcome.meets_slo(slo), minlength=len(edges))
    full = counts > 0
    return (edges[full] / 3600).tolist(), (met[full] / counts[full]).tolist()


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
