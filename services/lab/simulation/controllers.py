"""Autoscalers to compare, each from its published rule."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import ceil, floor

import numpy as np

from ...control.scaling.decide import decide
from ...control.scaling.sizing import stage_times
from ...control.scaling.values import Memory, Pool, ScalingPolicy, Slo
from .world import PoolTarget, Telemetry


@dataclass(slots=True)
class SloController:
    """This project's controller, as the service runs it."""

    policy: ScalingPolicy
    memory: Memory = field(default_factory=Memory)

    def target(self, now: Telemetry) -> PoolTarget:
        """Decide as the service does; see `scaling.decide`."""
        decision, self.memory = decide(now.seen, self.policy, self.memory)
        return PoolTarget({pool: each.replicas for pool, each in decision.pools.items()})


@dataclass(frozen=True, slots=True)
class Fixed:
    """Constant pool sizes."""

    replicas: Mapping[Pool, int]

    def target(self, now: Telemetry) -> PoolTarget:
        """Return the same sizes every time."""
        del now
        return PoolTarget(self.replicas)


@dataclass(slots=True)
class OngoingRequests:
    """Ray Serve's default: as many replicas as ongoing requests over their target.

    The mean over `look_back_s` decides; a change must be asked for through all of a delay.
    Published defaults: 2 ongoing per replica, up after 30 s, down after 600 s, look back 30 s.
    """

    per_replica: Mapping[Pool, float]
    maximum: Mapping[Pool, int]
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    look_back_s: float = 30.0
    minimum: int = 1
    _history: deque[tuple[float, Mapping[Pool, int]]] = field(default_factory=deque)
    _since_s: dict[tuple[Pool, bool], float] = field(default_factory=dict)

    def target(self, now: Telemetry) -> PoolTarget:
        """Return `ceil(ongoing / target)`, once it has been wanted for long enough."""
        now_s = now.seen.now_s
        self._history.append((now_s, now.ongoing))
        while self._history[0][0] < now_s - self.look_back_s:
            self._history.popleft()
        return PoolTarget({pool: self._size_of(pool, now) for pool in Pool})

    def _size_of(self, pool: Pool, now: Telemetry) -> int:
        ongoing = sum(each[pool] for _, each in self._history) / len(self._history)
        desired = ceil(ongoing / self.per_replica[pool])
        desired = min(max(desired, self.minimum), self.maximum[pool])
        current = now.seen.pools[pool].provisioned
        for up, delay_s in ((True, self.upscale_delay_s), (False, self.downscale_delay_s)):
            asked = desired > current if up else desired < current
            if not asked:
                self._since_s.pop((pool, up), None)
                continue
            since_s = self._since_s.setdefault((pool, up), now.seen.now_s)
            if now.seen.now_s - since_s >= delay_s:
                del self._since_s[pool, up]
                return desired
        return current


@dataclass(slots=True)
class LatencyBand:
    """The control law that llm-d publishes for KEDA: the P90 latency over its SLO, in a band.

    s = mean over 45 s of min(P90 / SLO, 2). Above 0.55, with c = ready / provisioned:
    n + ceil(n (s c / 0.55 - 1)); below 0.40: n - floor(n (1 - s / 0.40)). Asked every 15 s; up by
    at most max(100 %, 4) a minute, down by at most 1 in two minutes.
    """

    slo: Slo
    maximum: Mapping[Pool, int]
    minimum: int = 1
    high: float = 0.55
    low: float = 0.40
    _signals: deque[tuple[float, Mapping[Pool, float]]] = field(default_factory=deque)
    _asked_s: float = -1e9
    _bases: dict[Pool, deque[tuple[float, int]]] = field(default_factory=dict)
    _targets: dict[Pool, int] = field(default_factory=dict)
    _down_s: dict[Pool, float] = field(default_factory=dict)

    def target(self, now: Telemetry) -> PoolTarget:
        """Apply the law to every pool, with the latency that it causes."""
        now_s = now.seen.now_s
        if not self._targets:
            self._targets = {pool: each.provisioned for pool, each in now.seen.pools.items()}
        recent = now.first_token_s >= now_s - 15.0
        signal = self._signal(now.ttft_s[recent], now.gap_s)
        if signal is not None:
            self._signals.append((now_s, signal))
        while self._signals and self._signals[0][0] < now_s - 45.0:
            self._signals.popleft()
        if now_s - self._asked_s >= 15.0 and self._signals:
            self._asked_s = now_s
            self._targets = {pool: self._size_of(pool, now) for pool in Pool}
        return PoolTarget(dict(self._targets))

    def _signal(self, ttft_s: np.ndarray, gap_s: np.ndarray) -> Mapping[Pool, float] | None:
        if len(ttft_s) == 0 or len(gap_s) == 0:
            return None  # hold
        first = min(2.0, float(np.percentile(ttft_s, 90)) / self.slo.ttft_s)
        second = min(2.0, float(np.percentile(gap_s, 90)) / self.slo.gap_s)
        return {Pool.SPECULATOR: first, Pool.PREFILL: first, Pool.DECODE: second}

    def _size_of(self, pool: Pool, now: Telemetry) -> int:
        state, now_s = now.seen.pools[pool], now.seen.now_s
        current = max(1, state.provisioned)
        signal = sum(each[pool] for _, each in self._signals) / len(self._signals)
        bases = self._bases.setdefault(pool, deque())
        bases.append((now_s, current))
        while bases[0][0] < now_s - 60.0:
            bases.popleft()
        if signal > self.high:
            credit = state.ready / current
            wanted = current + ceil(current * (signal * credit / self.high - 1.0))
            base = min(size for _, size in bases)
            allowed = min(base + max(base, 4), self.maximum[pool])
            return max(min(wanted, allowed), current)
        if signal < self.low and now_s - self._down_s.get(pool, -1e9) >= 120.0:
            wanted = current - floor(current * (1.0 - signal / self.low))
            if wanted < current:
                self._down_s[pool] = now_s
                return max(self.minimum, current - 1)
        return current


@dataclass(slots=True)
class ThroughputPlanner:
    """Dynamo's planner: a throughput loop sets the floor, a load loop corrects it by one.

    Every 180 s: requests that *ended* in the last interval and their mean lengths, the last value
    as the forecast, `ceil(demand / capacity)`, at most 8 replicas a step; a prefill engine's
    capacity is one over its time for the mean prompt. Every 5 s: one more when the estimated time
    to first token exceeds the SLO; one less when N / (N - 1) of the wait would stay within 0.8 of
    what the SLO leaves.
    """

    slo: Slo
    maximum: Mapping[Pool, int]
    interval_s: float = 180.0
    max_step: int = 8
    sensitivity: float = 0.8
    _asked_s: float = 0.0
    _counted: tuple[int, int] = (0, 0)
    _floors: dict[Pool, int] = field(default_factory=lambda: dict.fromkeys(Pool, 1))

    def target(self, now: Telemetry) -> PoolTarget:
        """Return the larger of the floor and the load loop's size."""
        now_s = now.seen.now_s
        if now_s - self._asked_s >= self.interval_s:
            pairs = zip((now.first_tokens, now.completed), self._counted, strict=True)
            first, whole = ((count - past) / (now_s - self._asked_s) for count, past in pairs)
            self._asked_s, self._counted = now_s, (now.first_tokens, now.completed)
            self._plan(now, first, whole)
        return PoolTarget({pool: self._correct_size(pool, now) for pool in Pool})

    def _plan(self, now: Telemetry, first_per_s: float, answers_per_s: float) -> None:
        busy = _mean_times(now, self.interval_s)
        if busy is None:
            return  # hold
        work = {
            Pool.SPECULATOR: first_per_s * busy[Pool.SPECULATOR],
            Pool.PREFILL: first_per_s * busy[Pool.PREFILL],
            Pool.DECODE: answers_per_s * busy[Pool.DECODE] / now.seen.engines.decode_slots,
        }
        for pool in Pool:
            current = now.seen.pools[pool].provisioned
            low, high = current - self.max_step, current + self.max_step
            self._floors[pool] = max(1, min(max(ceil(work[pool]), low), high))

    def _correct_size(self, pool: Pool, now: Telemetry) -> int:
        state, busy = now.seen.pools[pool], _mean_times(now, self.interval_s)
        current = state.provisioned
        if busy is None or state.ready == 0:
            return max(current, self._floors[pool])
        servers = state.ready * (now.seen.engines.decode_slots if pool is Pool.DECODE else 1)
        wait_s = max(0, now.ongoing[pool] - servers) * busy[pool] / servers
        own_s = 0.0 if pool is Pool.DECODE else busy[Pool.SPECULATOR] + busy[Pool.PREFILL]
        left_s = (self.slo.gap_s if pool is Pool.DECODE else self.slo.ttft_s) - own_s
        if wait_s > left_s and state.starting == 0:
            current += 1
        elif current > 1 and now.ongoing[pool] < servers * (current - 1) / current:
            safe = wait_s * current / (current - 1) < self.sensitivity * left_s
            current -= int(safe)
        return min(max(current, self._floors[pool]), self.maximum[pool])


def _mean_times(now: Telemetry, window_s: float) -> Mapping[Pool, float] | None:
    """Return the mean seconds that a request takes of each pool; None without requests."""
    seen = now.seen
    recent = None if seen.arrivals is None else seen.arrivals.since(seen.now_s - window_s)
    if recent is None or len(recent) == 0:
        return None
    few = recent.every(1 + len(recent) // 2000)
    return {pool: float(s.mean()) for pool, s in stage_times(few, seen.engines).by_pool().items()}


@dataclass(frozen=True, slots=True, eq=False)
class Schedule:
    """Follows a plan that knows the future: replicas start early, so that they are ready in time.

    `starts_s` `[I]` are the beginnings of the plan's intervals; `sizes` `[I]` per pool.
    """

    starts_s: np.ndarray
    sizes: Mapping[Pool, np.ndarray]
    cold_start_s: Mapping[Pool, float]
    tick_s: float

    def first_sizes(self) -> dict[Pool, int]:
        """Return the sizes at the start."""
        return {pool: int(sizes[0]) for pool, sizes in self.sizes.items()}

    def target(self, now: Telemetry) -> PoolTarget:
        """Return the most that is planned until a replica started now is ready."""
        return PoolTarget({pool: self._size_of(pool, now.seen.now_s) for pool in Pool})

    def _size_of(self, pool: Pool, now_s: float) -> int:
        until_s = now_s + self.cold_start_s[pool] + self.tick_s
        first = max(0, int(np.searchsorted(self.starts_s, now_s, side="right")) - 1)
        last = int(np.searchsorted(self.starts_s, until_s, side="right"))
        return int(self.sizes[pool][first : max(last, first + 1)].max())
