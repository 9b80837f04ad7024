"""The decision: pool sizes and keep-rate bounds for one observation. Pure.

1. Forecast each pool's work from arrivals (`demand`), for now and for when a replica that is
   started now is ready.
2. Find the cheapest sizes that meet the SLO (`sizing`), and what would drain the queues.
3. Grow at once, counting the replicas that start; shrink only to a size that was enough through
   all of its settling time. Keep to bounds and steps, and give a reason.
4. Where the ready replicas are too few, lower the keep rate as far as they need it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil

from . import sizing
from .demand import Demand, demand, dispersion
from .sizing import StageTimes, Workload
from .values import (
    Arrivals,
    Decision,
    KeepBounds,
    KeepReason,
    Memory,
    Observation,
    Pool,
    PoolDecision,
    PoolLimits,
    PoolState,
    ScalingPolicy,
    ScalingReason,
)

SIZED_FROM_S = 240.0  # the newest arrivals represent the next ones
SEEN = 30_000  # arrivals that are evaluated; of more, an even sample
SPARE = 1.03  # a pool shrinks to a size that sustains slightly more than the expected load
DRAIN_S = 60.0  # a queue that is too old shall be empty after this time


@dataclass(frozen=True, slots=True, eq=False)
class Outlook:
    """The work to come, and the requests that it is made of."""

    recent: Arrivals
    times: StageTimes
    demands: Mapping[Pool, Demand]
    dispersion: float

    def workload(self) -> Workload:
        """Return the pools' loads now."""
        work = {pool: each.now for pool, each in self.demands.items()}
        return sizing.workload(self.times, work, self.dispersion)

    def peak_workload(self, factor: float) -> Workload:
        """Return the highest load until new replicas are ready, times `factor`."""
        work = {pool: factor * each.peak for pool, each in self.demands.items()}
        return sizing.workload(self.times, work, self.dispersion)


def decide(seen: Observation, policy: ScalingPolicy, memory: Memory) -> tuple[Decision, Memory]:
    """Return sizes and keep-rate bounds for `seen`, and the memory for the next call."""
    if seen.arrivals is None:
        held = {pool: _hold_size(pool, seen, policy, memory) for pool in Pool}
        keep = KeepBounds(policy.keep_floor, policy.keep, KeepReason.NO_METRICS)
        return Decision(held, keep), memory
    arrivals = seen.arrivals.since(seen.now_s - policy.window_s)
    last_s = float(arrivals.time_s[-1]) if len(arrivals) > 0 else memory.last_arrival_s
    outlook = _outlook(arrivals, seen, policy)
    wanted = _wanted_sizes(outlook, seen, policy, 1.0)
    roomy = _wanted_sizes(outlook, seen, policy, SPARE)
    wishes = {pool: _recent_wishes(memory, pool, roomy[pool], seen.now_s, policy) for pool in Pool}
    started_s = seen.now_s if memory.started_s is None else memory.started_s
    idle = seen.now_s - (started_s if last_s is None else last_s) >= policy.idle_s
    pools = {}
    for pool in Pool:
        state = seen.pools.get(pool)
        if state is None:
            pools[pool] = _hold_size(pool, seen, policy, memory)
        else:
            # With some more work, fewer of one pool and more of another may be cheaper.
            most = max(wanted[pool], *(size for _, size in wishes[pool]))
            settled = seen.now_s - started_s >= policy.settling_s(pool)
            most = most if settled else max(most, state.provisioned)
            pools[pool] = _pool_decision(state, policy.pools[pool], wanted[pool], most, idle=idle)
    keep = _keep_bounds(outlook, seen, policy, pools)
    return Decision(pools, keep), Memory(wishes, last_s, started_s)


def _outlook(arrivals: Arrivals, seen: Observation, policy: ScalingPolicy) -> Outlook:
    span_s = min(policy.window_s, seen.now_s - seen.since_s)
    few = arrivals.every(1 + len(arrivals) // SEEN)
    times = sizing.stage_times(few, seen.engines)
    demands = {
        pool: demand(
            few.time_s, few.each * work_s, seen.now_s, span_s, policy.pools[pool].cold_start_s
        )
        for pool, work_s in times.by_pool().items()
    }
    recent = few.since(seen.now_s - SIZED_FROM_S)
    agreed_s = demands[Pool.PREFILL].window_s
    return Outlook(
        recent,
        sizing.stage_times(recent, seen.engines),
        demands,
        dispersion(arrivals.time_s, arrivals.each, seen.now_s, agreed_s),
    )


def _wanted_sizes(
    outlook: Outlook, seen: Observation, policy: ScalingPolicy, factor: float
) -> Mapping[Pool, int]:
    """Return the sizes that meet the SLO at `factor` times the expected work, unbounded."""
    if len(outlook.recent) == 0:
        return dict.fromkeys(Pool, 0)
    slots = seen.engines.decode_slots
    sizes = sizing.cheapest_sizes(outlook.peak_workload(factor), policy.slo, policy.pools, slots)
    wanted = {pool: sizes.of(pool) for pool in Pool}
    for pool in (Pool.SPECULATOR, Pool.PREFILL):
        state = seen.pools.get(pool)
        if state is not None:
            wanted[pool] += _to_drain(state, wanted[pool], policy)
    return wanted


def _to_drain(state: PoolState, wanted: int, policy: ScalingPolicy) -> int:
    """Return the extra replicas that drain a queue older than the SLO.

    A queue of `n` busy replicas whose oldest request waits for `a` seconds holds `n * a` seconds
    of work.
    """
    if state.queue_age_s <= policy.slo.ttft_s:
        return 0
    backlog_s = max(1, min(state.ready, wanted)) * (state.queue_age_s - policy.slo.ttft_s)
    return ceil(min(backlog_s / DRAIN_S, wanted))


def _recent_wishes(
    memory: Memory, pool: Pool, wanted: int, now_s: float, policy: ScalingPolicy
) -> tuple[tuple[float, int], ...]:
    """Return the wishes of the settling time, without those that a newer one exceeds."""
    start_s = now_s - policy.settling_s(pool)
    kept = [
        (time_s, size)
        for time_s, size in memory.wishes.get(pool, ())
        if time_s >= start_s and size > wanted
    ]
    return (*kept, (now_s, wanted))


def _pool_decision(
    state: PoolState, limits: PoolLimits, wanted: int, most: int, *, idle: bool
) -> PoolDecision:
    """Decide a pool's size from the wanted size and the highest recent wish."""
    current = state.provisioned
    if wanted > current:
        target, reason = wanted, ScalingReason.SLO_AT_RISK if current > 0 else ScalingReason.WAKING
    elif most < current:
        target, reason = most, ScalingReason.SMALLER_MEETS_SLO
    else:
        target, reason = (
            current,
            ScalingReason.STEADY if wanted == current else ScalingReason.SETTLING,
        )
    highest = current + max(limits.max_step, current)
    lowest = current - max(limits.max_step, ceil(current / 3))
    if not lowest <= target <= highest:
        target, reason = min(max(target, lowest), highest), ScalingReason.STEP_CAPPED
    floor = limits.minimum if idle else max(1, limits.minimum)
    if target < floor or (target == 0 and floor == 0):
        target, reason = floor, ScalingReason.AT_MINIMUM if floor > 0 else ScalingReason.IDLE
    if target > limits.maximum:
        target, reason = limits.maximum, ScalingReason.AT_MAXIMUM
    return PoolDecision(target, wanted, reason)


def _hold_size(
    pool: Pool, seen: Observation, policy: ScalingPolicy, memory: Memory
) -> PoolDecision:
    """Hold a pool without metrics at its size or last wish, within bounds."""
    state, limits = seen.pools.get(pool), policy.pools[pool]
    wishes = memory.wishes.get(pool, ())
    current = wishes[-1][1] if state is None and wishes else 0
    if state is not None:
        current = state.provisioned
    held = min(max(current, limits.minimum), limits.maximum)
    return PoolDecision(held, held, ScalingReason.NO_METRICS)


def _keep_bounds(
    outlook: Outlook,
    seen: Observation,
    policy: ScalingPolicy,
    pools: Mapping[Pool, PoolDecision],
) -> KeepBounds:
    """Return how far the keep rate must be lowered for the ready replicas."""
    states = [seen.pools.get(pool) for pool in (Pool.SPECULATOR, Pool.PREFILL)]
    if None in states:
        return KeepBounds(policy.keep_floor, policy.keep, KeepReason.NO_METRICS)
    speculators, prefills = (state.ready for state in states if state is not None)
    prefill = pools[Pool.PREFILL]
    if len(outlook.recent) == 0 or prefills >= prefill.wanted:
        return KeepBounds(policy.keep_floor, policy.keep, KeepReason.NOMINAL)
    scale = sizing.highest_keep_scale(
        outlook.recent,
        seen.engines,
        outlook.workload(),
        policy.slo,
        (speculators, prefills),
        min(1.0, policy.keep_floor / policy.keep),
    )
    if scale == 1.0:
        return KeepBounds(policy.keep_floor, policy.keep, KeepReason.NOMINAL)
    short = prefill.reason is ScalingReason.AT_MAXIMUM
    reason = KeepReason.SHORT_OF_REPLICAS if short else KeepReason.BRIDGING
    return KeepBounds(policy.keep_floor, policy.keep * scale, reason)
