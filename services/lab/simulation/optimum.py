"""The clairvoyant optimum: the cheapest plan found for a trace that is known in advance.

Each interval gets the cheapest sizes with which an exact replay of its own requests, starting from
the queues that the interval before left, keeps the misses of the whole trace within the SLO's
allowance so far. Plans with several lengths of interval are simulated and the cheapest that meets
the SLO is taken. Its keep rate is the nominal one, always.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import numpy as np

from ...control.scaling.sizing import StageTimes, stage_times
from ...control.scaling.values import Pool, PoolLimits
from .controllers import Schedule
from .run import simulate
from .trace import Trace
from .world import SimulationResult, World

INTERVALS_S = (60.0, 120.0, 240.0)
SPECULATORS_TRIED = 6  # sizes above the bare need
NEARLY = 0.001  # of all requests, that a plan may miss beyond the allowance
DECODE_WAIT = 0.5  # of the gap that the SLO allows; the KV travels in the rest
LEFT = 0.3  # of the SLO: the queue that an interval may leave to the next, per engine


@dataclass(frozen=True, slots=True)
class _Queues:
    """The times at which each engine is free."""

    first: tuple[float, ...] = ()
    second: tuple[float, ...] = ()
    third: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class _Part:
    """The requests of one interval."""

    start_s: float
    stop_s: float
    time_s: Sequence[float]
    speculate_s: Sequence[float]
    prefill_s: Sequence[float]
    decode_s: Sequence[float]

    @property
    def interval_s(self) -> float:
        return self.stop_s - self.start_s


def optimum(
    trace: Trace, world: World, limits: Mapping[Pool, PoolLimits]
) -> tuple[Schedule, SimulationResult]:
    """Return the best plan, as a controller, and its outcome."""
    plans = [plan_sizes(trace, world, limits, interval_s) for interval_s in INTERVALS_S]
    outcomes = [simulate(trace, world, plan, plan.first_sizes()) for plan in plans]

    def worth(place: int) -> tuple[float, float]:
        missing = world.slo.share - float(outcomes[place].meets_slo(world.slo).mean())
        return max(0.0, missing - NEARLY), sum(outcomes[place].replica_s.values())

    best = min(range(len(plans)), key=worth)
    return plans[best], outcomes[best]


def plan_sizes(
    trace: Trace, world: World, limits: Mapping[Pool, PoolLimits], interval_s: float
) -> Schedule:
    """Return a plan whose sizes change every `interval_s`."""
    times = stage_times(trace.arrivals(world.keep, world.min_prompt_tokens), world.engines)
    starts = np.arange(0.0, trace.duration_s + interval_s, interval_s)
    rows, queues, requests, missed = [], _Queues(), 0, 0
    for start_s in starts.tolist():
        part = _slice_trace(trace, times, start_s, interval_s)
        requests += len(part.time_s)
        allowed = (1.0 - world.slo.share) * requests - missed
        sizes, late, queues = _plan_interval(part, world, limits, allowed, queues)
        missed += late
        rows.append(sizes)
    columns = np.array(rows).T
    sizes_of = dict(zip(Pool, columns, strict=True))
    return Schedule(starts, sizes_of, world.cold_start_s, world.tick_s)


def _slice_trace(trace: Trace, times: StageTimes, start_s: float, interval_s: float) -> _Part:
    first, last = np.searchsorted(trace.time_s, (start_s, start_s + interval_s))
    rows = slice(int(first), int(last))
    return _Part(
        start_s,
        start_s + interval_s,
        trace.time_s[rows].tolist(),
        times.speculate_s[rows].tolist(),
        times.prefill_s[rows].tolist(),
        times.decode_s[rows].tolist(),
    )


def _plan_interval(
    part: _Part,
    world: World,
    limits: Mapping[Pool, PoolLimits],
    allowed: float,
    queues: _Queues,
) -> tuple[tuple[int, int, int], int, _Queues]:
    """Return the cheapest sizes, the number of missed requests, and the queues that are left."""
    best: tuple[float, tuple[int, int, int], int, _Queues] | None = None
    bare = max(1, int(sum(part.speculate_s) / part.interval_s))
    for speculators in range(bare, bare + SPECULATORS_TRIED):
        prefills, late, left = _fewest_prefills(part, world, allowed, queues, speculators)
        cost = speculators * limits[Pool.SPECULATOR].cost + prefills * limits[Pool.PREFILL].cost
        too_many = max(0.0, late - allowed)
        if best is None or (too_many, cost) < (max(0.0, best[2] - allowed), best[0]):
            best = cost, (speculators, prefills, 0), late, left
    assert best is not None
    _, (speculators, prefills, _), late, left = best
    decodes, third = _fewest_decodes(part, world, queues)
    return (speculators, prefills, decodes), late, _Queues(left.first, left.second, third)


def _fewest_prefills(
    part: _Part, world: World, allowed: float, queues: _Queues, speculators: int
) -> tuple[int, int, _Queues]:
    """Return the fewest prefill engines with at most `allowed` misses, or as many as help."""
    low = max(1, int(sum(part.prefill_s) / part.interval_s * 0.8))
    high = max(low, 2 * low + 8)
    late, left = _replay(part, world, queues, speculators, high)
    if late > allowed:
        return high, late, left
    while low < high:
        middle = (low + high) // 2
        tried = _replay(part, world, queues, speculators, middle)
        if tried[0] <= allowed:
            high, (late, left) = middle, tried
        else:
            low = middle + 1
    return high, late, left


def _replay(
    part: _Part, world: World, queues: _Queues, speculators: int, prefills: int
) -> tuple[int, _Queues]:
    """Return the number that miss the SLO, and the times when the engines are free."""
    ready, first = _serve(part.time_s, part.speculate_s, queues.first, speculators, part.start_s)
    order = sorted(range(len(ready)), key=ready.__getitem__)
    ended, second = _serve(
        [ready[i] for i in order],
        [part.prefill_s[i] for i in order],
        queues.second,
        prefills,
        part.start_s,
    )
    limit = world.slo.ttft_s
    late = sum(end - part.time_s[i] > limit for end, i in zip(ended, order, strict=True))
    if max(_left_s(first, part.stop_s), _left_s(second, part.stop_s)) > LEFT * limit:
        late = len(part.time_s)  # the next interval would pay for this one
    return late, _Queues(first, second)


def _left_s(free_s: tuple[float, ...], stop_s: float) -> float:
    return sum(max(0.0, free - stop_s) for free in free_s) / len(free_s)


def _serve(
    ready_s: Sequence[float],
    service_s: Sequence[float],
    free_s: tuple[float, ...],
    servers: int,
    start_s: float,
) -> tuple[list[float], tuple[float, ...]]:
    """Serve first come, first served: when each request ends, and when each server is free then."""
    free = sorted(free_s, reverse=True)[:servers] + [start_s] * max(0, servers - len(free_s))
    heapify(free)
    ends = []
    for time_s, busy_s in zip(ready_s, service_s, strict=True):
        if busy_s <= 0.0:
            ends.append(time_s)
            continue
        end_s = max(heappop(free), time_s) + busy_s
        heappush(free, end_s)
        ends.append(end_s)
    return ends, tuple(free)


def _fewest_decodes(part: _Part, world: World, queues: _Queues) -> tuple[int, tuple[float, ...]]:
    """Return the fewest decode replicas whose slots are free within the SLO's gap."""
    slots = world.engines.decode_slots
    longest = DECODE_WAIT * world.slo.gap_s
    busy = [(t, s) for t, s in zip(part.time_s, part.decode_s, strict=True) if s > 0.0]
    replicas = max(1, int(sum(s for _, s in busy) / part.interval_s / slots * 0.5))
    while True:
        ends, free = _serve(
            [t for t, _ in busy], [s for _, s in busy], queues.third, replicas * slots, part.start_s
        )
        waits = [end - s - t for (t, s), end in zip(busy, ends, strict=True)]
        late = sum(wait > longest for wait in waits)
        if late <= (1.0 - world.slo.share) * len(busy):
            return replicas, free
        replicas += 1
