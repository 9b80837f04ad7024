"""The three traces of the comparison, and the controllers that run on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import ceil

import numpy as np

from ...control.admission import AdmissionPolicy
from ...control.scaling.values import Engines, Pool, PoolLimits, ScalingPolicy, Slo
from ...control.stages import Curve, StageCurves
from .controllers import (
    Fixed,
    LatencyBand,
    OngoingRequests,
    Schedule,
    SloController,
    ThroughputPlanner,
)
from .optimum import optimum
from .run import simulate
from .score import Score, score
from .trace import Lengths, Trace, bursty, diurnal, generate, poisson
from .world import Controller, SimulationResult, World

COLD_START_S = 100.0
# An 8B speculator before a 70B model: about 12k prompt tokens a second and 8 ms per kept 50.
ENGINES = Engines(
    StageCurves(
        speculate=Curve(0.02, 8e-6, 1e-10),
        prefill=Curve(0.01, 1.5e-4, 1e-9),
        transfer=Curve(0.005, 1e-6),
        first_decode=Curve(0.02, 1e-7),
    )
)
SLO = Slo(ttft_s=2.5, share=0.99)
SIZES_MAX, STEP = 5000, 32
ONGOING = {Pool.SPECULATOR: 2.0, Pool.PREFILL: 2.0, Pool.DECODE: 24.0}
_HALVINGS = 7
OURS, OPTIMUM = "this project", "clairvoyant optimum"


@dataclass(frozen=True, slots=True, eq=False)
class SimulationScenario:
    """A trace in a world, and the policy for it."""

    name: str
    trace: Trace
    world: World
    policy: ScalingPolicy

    @property
    def admission(self) -> AdmissionPolicy:
        """The gateway's admission policy for this trace."""
        return AdmissionPolicy(self.world.slo.ttft_s, self.world.slo.gap_s)


def scenario(
    name: str, trace: Trace, slo: Slo = SLO, engines: Engines = ENGINES,
    cold_start_s: float = COLD_START_S,
) -> SimulationScenario:  # fmt: skip
    """Make a trace with the comparison's policy: every replica costs the same."""
    limits = PoolLimits(1, SIZES_MAX, 1.0, cold_start_s, STEP)
    world = World(engines, slo, dict.fromkeys(Pool, cold_start_s))
    policy = ScalingPolicy(slo, dict.fromkeys(Pool, limits), world.keep, world.keep_floor)
    return SimulationScenario(name, trace, world, policy)


def three_scenarios(seed: int) -> list[SimulationScenario]:
    """Return a day, prompts that grow, and ten times the load from one second to the next."""
    day = generate(diurnal(30.0, 7200.0), 7200.0, Lengths(), seed)
    drift = generate(poisson(30.0), 3600.0, Lengths(prompt_tokens=6000.0), seed, drift=2.0)
    return [
        scenario("diurnal", day),
        scenario("drifting lengths", drift),
        burst_scenario(seed, COLD_START_S),
    ]


def burst_scenario(seed: int, cold_start_s: float) -> SimulationScenario:
    """Return ten times the load from one second to the next, for ten minutes of an hour."""
    burst = generate(bursty(6.0, 10.0, 600.0, 1e9, 1500.0), 3600.0, Lengths(), seed)
    return scenario("10x burst", burst, cold_start_s=cold_start_s)


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """One controller on one trace."""

    score: Score
    outcome: SimulationResult


def compare(case: SimulationScenario, note: Callable[[str], None]) -> list[Entry]:
    """Run every controller on one trace, the optimum first and this project's second.

    The fixed sizes are the mean of this project's, rounded up: at least its replica-hours.
    """
    best, entries = _beside_optimum(case, note)
    initial, ours = best.first_sizes(), entries[1].outcome
    maximum = {pool: 2 * int(sizes.max()) for pool, sizes in best.sizes.items()}
    for name, controller in _others(case, ours, maximum).items():
        entries.append(_entry(name, simulate(case.trace, case.world, controller, initial), case))
        note(name)
    thriftiest = min(entries[2:], key=lambda entry: entry.score.replica_hours).score
    if thriftiest.replica_hours < entries[1].score.replica_hours:
        name = f"{OURS}, hours of {thriftiest.controller}"
        entries.append(
            _entry(name, _within_budget(thriftiest.replica_hours, case, ours, initial), case)
        )
        note(name)
    return entries


def compare_with_optimum(case: SimulationScenario, note: Callable[[str], None]) -> list[Entry]:
    """Run the optimum and this project alone."""
    return _beside_optimum(case, note)[1]


def _beside_optimum(
    case: SimulationScenario, note: Callable[[str], None]
) -> tuple[Schedule, list[Entry]]:
    best, outcome = optimum(case.trace, case.world, case.policy.pools)
    note(OPTIMUM)
    controller = SloController(case.policy)
    ours = simulate(case.trace, case.world, controller, best.first_sizes(), case.admission)
    note(OURS)
    return best, [_entry(OPTIMUM, outcome, case), _entry(OURS, ours, case)]


def _within_budget(
    replica_hours: float,
    case: SimulationScenario,
    ours: SimulationResult,
    initial: Mapping[Pool, int],
) -> SimulationResult:
    """Run this project under bounds that keep it to `replica_hours`: the loosest found.

    The bounds are one share of what each pool had at its largest.
    """
    peaks = {pool: int(ours.moments.provisioned[pool].max()) for pool in Pool}
    found, low, high = ours, 0.0, 1.0
    for _ in range(_HALVINGS):
        share = (low + high) / 2
        caps = {pool: max(1, int(share * peak)) for pool, peak in peaks.items()}
        limits = {
            pool: replace(each, maximum=caps[pool]) for pool, each in case.policy.pools.items()
        }
        first = {pool: min(sizes, caps[pool]) for pool, sizes in initial.items()}
        controller = SloController(replace(case.policy, pools=limits))
        outcome = simulate(case.trace, case.world, controller, first, case.admission)
        if sum(outcome.replica_s.values()) <= replica_hours * 3600:
            found, low = outcome, share
        else:
            high = share
    return found


def _others(
    case: SimulationScenario, ours: SimulationResult, maximum: Mapping[Pool, int]
) -> dict[str, Controller]:
    """Return all but the optimum, without admission. `maximum` bounds those without a model."""
    mean = {pool: ceil(float(np.mean(ours.moments.provisioned[pool]))) for pool in Pool}
    slo = case.world.slo
    return {
        f"{OURS}, no admission": SloController(case.policy),
        "fixed, same hours": Fixed(mean),
        "ongoing requests (Ray)": OngoingRequests(ONGOING, maximum),
        "P90/SLO band (llm-d, KEDA)": LatencyBand(slo, maximum),
        "throughput (Dynamo)": ThroughputPlanner(slo, maximum),
    }


@dataclass(frozen=True, slots=True)
class Distance:
    """The gap between this project's attainment and the optimum's, part by part."""

    cold_start: float  # gained if replicas were ready at once
    keep_floor: float  # gained beyond, if the keep rate could go down as far as it takes
    control: float  # the rest


def distance(case: SimulationScenario, entries: list[Entry]) -> Distance:
    """Measure the gain of removing the cold start, then the floor."""
    initial = {
        pool: int(sizes[0]) for pool, sizes in entries[0].outcome.moments.provisioned.items()
    }
    tick_s = case.world.tick_s
    warm_limits = {
        pool: replace(each, cold_start_s=tick_s) for pool, each in case.policy.pools.items()
    }
    warm = replace(case.policy, pools=warm_limits)
    warm_world = replace(case.world, cold_start_s=dict.fromkeys(Pool, 0.0))
    free_world = replace(warm_world, keep_floor=0.001)
    reached = [
        float(
            simulate(case.trace, world, SloController(warm), initial, case.admission)
            .meets_slo(world.slo)
            .mean()
        )
        for world in (warm_world, free_world)
    ]
    best, ours = (entry.score.attainment for entry in entries[:2])
    return Distance(reached[0] - ours, reached[1] - reached[0], best - reached[1])


def _entry(name: str, outcome: SimulationResult, case: SimulationScenario) -> Entry:
    return Entry(score(name, outcome, case.world.slo, case.trace.duration_s), outcome)
