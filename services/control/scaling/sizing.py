"""Finds the cheapest pool sizes that meet the SLO, and the highest keep rate for given sizes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from .queueing import Load, Waits, attainment, load, two_stage_attainment, waits
from .values import Arrivals, Engines, Floats, Pool, PoolLimits, Slo

SAMPLES = 1024  # sampled requests
CANDIDATES = np.linspace(0.02, 9.0, 72)  # sizes that are tried: work + z * sqrt(work)
NEARLY = 0.003  # of the share, where no size reaches the SLO
DECODE_MISSES = 0.1  # of the SLO's allowance; the first token has the rest, nearly
KEEP_STEPS = 7  # halvings of the range of keep rates


@dataclass(frozen=True, slots=True, eq=False)
class StageTimes:
    """The seconds that each arrival takes in each pool, `[N]`; 0: it does not go there."""

    speculate_s: Floats
    prefill_s: Floats
    decode_s: Floats

    def by_pool(self) -> Mapping[Pool, Floats]:
        """Return the times of each pool."""
        return {
            Pool.SPECULATOR: self.speculate_s,
            Pool.PREFILL: self.prefill_s,
            Pool.DECODE: self.decode_s,
        }

    def sample(self, count: int) -> StageTimes:
        """Return about `count` arrivals, evenly spread over their unqueued time to first token."""
        step = max(1, len(self.prefill_s) // count)
        order = np.argsort(self.speculate_s + self.prefill_s)[step // 2 :: step]
        return StageTimes(self.speculate_s[order], self.prefill_s[order], self.decode_s[order])


@dataclass(frozen=True, slots=True, eq=False)
class Workload:
    """The work of the pools: samples of the stage times, and the load of each pool."""

    times: StageTimes
    speculate: Load
    prefill: Load
    decode: Load


@dataclass(frozen=True, slots=True)
class Sizes:
    """Replicas of the three pools, and the share of requests expected to meet the SLO."""

    speculator: int
    prefill: int
    decode: int
    share: float

    def of(self, pool: Pool) -> int:
        """Return the replicas of `pool`."""
        return {
            Pool.SPECULATOR: self.speculator,
            Pool.PREFILL: self.prefill,
            Pool.DECODE: self.decode,
        }[pool]


def stage_times(arrivals: Arrivals, engines: Engines, keep_scale: float = 1.0) -> StageTimes:
    """Return the stage times of arrivals whose kept share is `keep_scale` times the nominal."""
    curves, prompt = engines.curves, arrivals.prompt_tokens
    pruned = arrivals.kept_tokens < prompt
    kept = np.where(pruned, arrivals.kept_tokens * keep_scale, arrivals.kept_tokens)
    cached = kept * engines.cached_share
    speculate, prefill = curves.speculate, curves.prefill
    fresh = kept - cached
    read = prompt * engines.remembered_share
    unread = prompt - read
    steps = np.maximum(arrivals.output_tokens - 1.0, 0.0)
    first_s = curves.transfer.base_s + curves.first_decode.base_s
    token_s = curves.transfer.token_s + curves.first_decode.token_s
    return StageTimes(
        speculate_s=np.where(
            pruned,
            speculate.base_s
            + speculate.token_s * unread
            + speculate.pair_s * unread * (unread + 2.0 * read),
            0.0,
        ),
        prefill_s=prefill.base_s
        + prefill.token_s * fresh
        + prefill.pair_s * fresh * (fresh + 2.0 * cached),
        decode_s=np.where(
            steps > 0, first_s + token_s * kept + engines.output_token_s * steps, 0.0
        ),
    )


def workload(times: StageTimes, work: Mapping[Pool, float], dispersion: float) -> Workload:
    """Return the loads of the pools. `work`: server-seconds per second that each must do."""
    few = times.sample(SAMPLES)
    return Workload(
        few,
        load(work[Pool.SPECULATOR], times.speculate_s, dispersion),
        load(work[Pool.PREFILL], times.prefill_s, dispersion),
        load(work[Pool.DECODE], times.decode_s, dispersion),
    )


def cheapest_sizes(
    work: Workload, slo: Slo, limits: Mapping[Pool, PoolLimits], decode_slots: int
) -> Sizes:
    """Return the sizes of least cost whose expected share meets the SLO, without bounds.

    Where no size reaches it, because the stages alone take too long, the least cost that comes
    near the best that is possible.
    """
    first, second = _candidates(work.speculate.work), _candidates(work.prefill.work)
    share = _first_token(work, slo, first, second)
    enough = share >= min(slo.share, float(share.max()) - NEARLY)
    cost = first[:, None] * limits[Pool.SPECULATOR].cost + second * limits[Pool.PREFILL].cost
    place = np.unravel_index(np.argmin(np.where(enough, cost, np.inf)), cost.shape)
    return Sizes(
        speculator=int(first[place[0]]),
        prefill=int(second[place[1]]),
        decode=_decode_replicas(work.decode, slo, decode_slots),
        share=float(share[place]),
    )


def expected_share(work: Workload, slo: Slo, speculators: int, prefills: int) -> float:
    """Return the share of requests that get their first token in time from these pools."""
    first, second = np.array([float(speculators)]), np.array([float(prefills)])
    return float(_first_token(work, slo, first, second)[0, 0])


def highest_keep_scale(
    arrivals: Arrivals,
    engines: Engines,
    work: Workload,
    slo: Slo,
    ready: tuple[int, int],
    lowest: float,
) -> float:
    """Find the largest part of the nominal keep rate, in `[lowest, 1]`, that `ready` sustains.

    `ready`: speculators and prefill engines. `lowest` when not even that suffices.
    """
    few = arrivals.every(max(1, len(arrivals) // SAMPLES))
    nominal = max(float(stage_times(few, engines).prefill_s.sum()), 1e-12)

    def meets(scale: float) -> bool:
        times = stage_times(few, engines, scale)
        shrunk = float(times.prefill_s.sum()) / nominal
        prefill = load(work.prefill.work * shrunk, times.prefill_s, 1.0)
        lowered = replace(work, times=times, prefill=prefill)
        return expected_share(lowered, slo, *ready) >= slo.share

    if meets(1.0):
        return 1.0
    low, high = lowest, 1.0
    for _ in range(KEEP_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if meets(middle) else (low, middle)
    return low


def _first_token(work: Workload, slo: Slo, first: Floats, second: Floats) -> Floats:
    slack_s = slo.ttft_s - work.times.speculate_s - work.times.prefill_s
    return two_stage_attainment(waits(work.speculate, first), waits(work.prefill, second), slack_s)


def _decode_replicas(decode: Load, slo: Slo, slots: int) -> int:
    """Return the fewest replicas whose slots are free in time."""
    if decode.work <= 0.0:
        return 0
    replicas = np.unique(np.ceil(_candidates(decode.work) / slots))
    ahead: Waits = waits(decode, replicas * slots)
    enough = 1.0 - (1.0 - slo.share) * DECODE_MISSES
    met = attainment(ahead, slo.gap_s) >= enough
    return int(replicas[np.argmax(met)] if met.any() else replicas[-1])


def _candidates(work: float) -> Floats:
    """Return sizes worth trying, ascending: from just enough for the work to no waiting."""
    if work <= 0.0:
        return np.array([0.0])
    return np.unique(np.floor(work + CANDIDATES * np.sqrt(work)) + 1.0)
