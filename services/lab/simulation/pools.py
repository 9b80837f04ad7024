"""The replicas that a steady load needs, and their cost, for several keep rates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...control.scaling.sizing import Sizes, cheapest_sizes, stage_times, workload
from ...control.scaling.values import Arrivals, Engines, Pool, PoolLimits, Slo
from .trace import Lengths, generate, poisson

REQUESTS = 4000  # drawn to stand for the length mix
SEED = 1


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Pool sizes for one keep rate. `reachable` is False when no size meets the SLO."""

    keep: float
    sizes: Sizes
    cost: float
    reachable: bool


def plans(
    per_s: float,
    lengths: Lengths,
    keeps: Sequence[float],
    engines: Engines,
    slo: Slo,
    costs: Mapping[Pool, float],
) -> list[PoolPlan]:
    """Return the cheapest pools for Poisson arrivals of `per_s`, one plan per keep rate."""
    trace = generate(poisson(per_s), REQUESTS / per_s, lengths, SEED)
    limits = {pool: PoolLimits(cost=costs[pool]) for pool in Pool}
    return [_plan(trace.arrivals(keep), per_s, keep, engines, slo, limits) for keep in keeps]


def _plan(
    arrivals: Arrivals,
    per_s: float,
    keep: float,
    engines: Engines,
    slo: Slo,
    limits: Mapping[Pool, PoolLimits],
) -> PoolPlan:
    times = stage_times(arrivals, engines)
    work = {pool: per_s * float(np.mean(each)) for pool, each in times.by_pool().items()}
    sizes = cheapest_sizes(workload(times, work, 1.0), slo, limits, engines.decode_slots)
    cost = sum(sizes.of(pool) * limits[pool].cost for pool in Pool)
    return PoolPlan(keep, sizes, cost, sizes.share >= slo.share)
