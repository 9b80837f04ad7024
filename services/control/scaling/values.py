"""The inputs and outputs of the autoscaler. Plain data."""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ..stages import StageCurves

Floats = NDArray[np.float64]


class Pool(enum.StrEnum):
    """The three pools that are sized."""

    SPECULATOR = "speculator"
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Arrival:
    """One request, as it arrived: nothing in here waits for the request to end."""

    time_s: float
    prompt_tokens: int
    kept_tokens: int  # to prefill at the nominal keep rate; prompt_tokens: dense, no speculator
    output_tokens: int  # an estimate, if the answer is not complete


@dataclass(frozen=True, slots=True, eq=False)
class Arrivals:
    """Many arrivals as columns `[N]`, sorted by time. Each row stands for `each` arrivals."""

    time_s: Floats
    prompt_tokens: Floats
    kept_tokens: Floats
    output_tokens: Floats
    each: float = 1.0

    @classmethod
    def of(cls, arrivals: Iterable[Arrival]) -> Arrivals:
        """Build the columns from single arrivals, in any order."""
        rows = sorted(
            (each.time_s, each.prompt_tokens, each.kept_tokens, each.output_tokens)
            for each in arrivals
        )
        columns = np.array(rows, dtype=np.float64).reshape(len(rows), 4).T
        return cls(*columns)

    def __len__(self) -> int:
        return len(self.time_s)

    def since(self, start_s: float) -> Arrivals:
        """Return the arrivals at or after `start_s`."""
        return self._rows(slice(int(np.searchsorted(self.time_s, start_s)), None))

    def every(self, step: int) -> Arrivals:
        """Return one of every `step` rows, evenly spread, which stands for all of them."""
        return self._rows(slice(step // 2, None, step), step)

    def _rows(self, rows: slice, step: int = 1) -> Arrivals:
        return Arrivals(
            self.time_s[rows],
            self.prompt_tokens[rows],
            self.kept_tokens[rows],
            self.output_tokens[rows],
            step * self.each,
        )


@dataclass(frozen=True, slots=True)
class PoolState:
    """The present state of one pool."""

    ready: int
    starting: int = 0  # requested, but not ready yet
    queue_age_s: float = 0.0  # wait of its oldest request

    @property
    def provisioned(self) -> int:
        """The replicas that are ready or starting."""
        return self.ready + self.starting


@dataclass(frozen=True, slots=True)
class Slo:
    """`share` of all requests get their first token within `ttft_s`."""

    ttft_s: float
    share: float = 0.95
    gap_s: float = 1.0  # and the second token within this of the first: sizes the decode pool


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Bounds and costs of one pool."""

    minimum: int = 1  # 0: may sleep when nothing arrives
    maximum: int = 1
    cost: float = 1.0  # of one replica, in any unit, e.g. its GPUs
    cold_start_s: float = 100.0
    max_step: int = 8  # in one decision; a pool may always double, and lose a third


@dataclass(frozen=True, slots=True)
class ScalingPolicy:
    """The operator's goals. `keep_floor` bounds how far a burst may lower the keep rate."""

    slo: Slo
    pools: Mapping[Pool, PoolLimits]
    keep: float = 0.3  # nominal keep rate
    keep_floor: float = 0.1
    # Shrink only after a smaller size sufficed this long. None: the pool's `cold_start_s`, since
    # who keeps a replica for as long as it takes to get it back spends at most twice what
    # hindsight would (ski rental; Karlin et al., Competitive Snoopy Caching, 1988).
    settle_s: float | None = None
    idle_s: float = 600.0  # without arrivals for this long, a pool with minimum 0 sleeps
    window_s: float = 600.0  # how far back arrivals count

    def settling_s(self, pool: Pool) -> float:
        """Return how long a smaller size must have sufficed before the pool shrinks."""
        return self.pools[pool].cold_start_s if self.settle_s is None else self.settle_s


@dataclass(frozen=True, slots=True)
class Engines:
    """The speed of the pools: learnt stage times, and the decode engines' shape."""

    curves: StageCurves
    output_token_s: float = 0.03  # per output token of one sequence, at the usual batch
    decode_slots: int = 32  # sequences that a decode replica runs at once
    cached_share: float = 0.0  # of the kept tokens, found in the prefix cache
    remembered_share: float = 0.0  # of pruned prompts' tokens, by the speculators


@dataclass(frozen=True, slots=True, eq=False)
class Observation:
    """The observed state at `now_s`. A pool that is not in `pools` did not report."""

    now_s: float
    since_s: float  # `arrivals` holds every arrival from then on
    arrivals: Arrivals | None  # None: the metrics are missing
    pools: Mapping[Pool, PoolState]
    engines: Engines


class ScalingReason(enum.StrEnum):
    """The reason for a pool's size."""

    NO_METRICS = "no_metrics"  # held as it is, at least at its minimum
    STEADY = "steady"  # the size that meets the SLO
    SLO_AT_RISK = "slo_at_risk"  # grows: the present size would miss the SLO
    SMALLER_MEETS_SLO = "smaller_meets_slo"  # shrinks
    SETTLING = "settling"  # a smaller size would do, but not for long enough yet
    AT_MINIMUM = "at_minimum"
    AT_MAXIMUM = "at_maximum"
    STEP_CAPPED = "step_capped"
    IDLE = "idle"  # asleep: nothing arrives
    WAKING = "waking"


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """The size of one pool. `wanted` is what the SLO asks for, before bounds and steps."""

    replicas: int
    wanted: int
    reason: ScalingReason


class KeepReason(enum.StrEnum):
    """The reason for the bounds of the keep rate."""

    NOMINAL = "nominal"  # the replicas that are ready meet the SLO
    BRIDGING = "bridging"  # until the replicas that start are ready
    SHORT_OF_REPLICAS = "short_of_replicas"  # at the pool's maximum
    NO_METRICS = "no_metrics"


@dataclass(frozen=True, slots=True)
class KeepBounds:
    """A request's keep rate stays within these, unless its caller's floor is higher."""

    low: float
    high: float  # below the nominal rate when the ready replicas are too few for it
    reason: KeepReason


@dataclass(frozen=True, slots=True)
class Decision:
    """The sizes of the pools, and the bounds of the keep rate."""

    pools: Mapping[Pool, PoolDecision]
    keep: KeepBounds


@dataclass(frozen=True, slots=True)
class Memory:
    """The state that one decision leaves for the next: wishes `(time, replicas)` per pool."""

    wishes: Mapping[Pool, tuple[tuple[float, int], ...]] = field(default_factory=dict)
    last_arrival_s: float | None = None
    started_s: float | None = (
        None  # the first decision; no pool shrinks while it settles from then on
    )
