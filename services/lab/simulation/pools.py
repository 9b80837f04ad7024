"""The replicas that a steady load needs, and their cost, for several keep rates."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...control.scaling.sizing import Sizes, cheapest_sizes, stage_times, workload
from ...control.scaling.values import Arrivals, Engines, Pool, PoolLimits, Slo
from .hardware import DecodeNeeds, KvLimits
from .trace import Lengths, generate, poisson

REQUESTS = 4000  # drawn to stand for the length mix
SEED = 1
_LONG = 0.99  # of the requests must fit into a decode replica


class Bound(enum.StrEnum):
    """The limit that the size of the decode pool comes from."""

    SLOTS = "slots"  # the sequences that run at once
    MEMORY = "KV memory"
    NETWORK = "network"


@dataclass(frozen=True, slots=True)
class PoolPlan:
    """Pool sizes for one keep rate. `reachable` is False when no size meets the SLO."""

    keep: float
    sizes: Sizes
    cost: float
    reachable: bool
    bound: Bound
    long_tokens: int  # kept and answered, of all but one in a hundred requests
    fits: bool  # a decode replica has room for as many


def plans(
    per_s: float,
    lengths: Lengths,
    keeps: Sequence[float],
    engines: Engines,
    slo: Slo,
    costs: Mapping[Pool, float],
    kv: KvLimits,
) -> list[PoolPlan]:
    """Return the cheapest pools for Poisson arrivals of `per_s`, one plan per keep rate."""
    trace = generate(poisson(per_s), REQUESTS / per_s, lengths, SEED)
    limits = {pool: PoolLimits(cost=costs[pool]) for pool in Pool}
    return [_plan(trace.arrivals(keep), per_s, keep, engines, slo, limits, kv) for keep in keeps]


def _plan(
    arrivals: Arrivals,
    per_s: float,
    keep: float,
    engines: Engines,
    slo: Slo,
    limits: Mapping[Pool, PoolLimits],
    kv: KvLimits,
) -> PoolPlan:
    times = stage_times(arrivals, engines)
    work = {pool: per_s * float(np.mean(each)) for pool, each in times.by_pool().items()}
    sizes = cheapest_sizes(workload(times, work, 1.0), slo, limits, engines.decode_slots)
    needs = DecodeNeeds.of(arrivals, times, per_s, kv)
    wanted = {
        Bound.SLOTS: sizes.decode,
        Bound.MEMORY: needs.memory,
        Bound.NETWORK: needs.network,
    }
    bound = max(Bound, key=lambda each: wanted[each])  # the first of equals
    sizes = replace(sizes, decode=wanted[bound])
    cost = sum(sizes.of(pool) * limits[pool].cost for pool in Pool)
    longest = int(np.quantile(arrivals.kept_tokens + arrivals.output_tokens, _LONG))
    fits = longest <= kv.longest_tokens
    return PoolPlan(keep, sizes, cost, sizes.share >= slo.share, bound, longest, fits)
