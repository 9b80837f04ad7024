"""Gateways that share the pools, each with a gate of its own: the real gates in virtual time.

One stream of arrivals goes to the gateways in turn, as a balancer spreads it. The pools are queues
that all gateways share, first come, first served.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

import pytest

from specprefill.control.admission import AdmissionPolicy
from specprefill.control.admitting import AdmissionGate
from specprefill.control.gate import Gate
from specprefill.control.gateway_share import GatewayShare
from specprefill.control.request_summary import RequestSummary
from specprefill.control.shared_gate import View
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.errors import DeadlineExceeded, Overloaded
from specprefill.core.types import Plan, PlanKind, Reason, Request
from tests.unit.control.gate_links import connected, shared_gate
from tests.unit.control.virtual_time import run_in_virtual_time

SLO_S, KEEP, FLOOR = 1.0, 0.3, 0.1
SPECULATORS, PER_ENGINE = 1, 2
PROMPT = tuple(range(4000))
ARRIVALS = 466


@dataclass(frozen=True)
class Pool:
    """The prefill pool; `prefill` is one engine's time by kept tokens."""

    prefills: int
    prefill: Curve

    @property
    def curves(self) -> StageCurves:
        return StageCurves(Curve(0.02), self.prefill, Curve(), Curve())

    @property
    def sustained_per_s(self) -> float:
        return self.prefills / self.prefill.seconds(KEEP * len(PROMPT))

    @property
    def max_let_in(self) -> int:
        return PER_ENGINE * (self.prefills + SPECULATORS)


FOUR = Pool(4, Curve(0.04, 3e-4))  # 0.4 s a prompt: ten a second
ONE = Pool(1, Curve(0.02, 1.5e-4))  # 0.2 s a prompt: five a second


@dataclass
class Outcome:
    """The outcome of one run."""

    ttfts_s: list[float] = field(default_factory=list)
    keeps: list[float] = field(default_factory=list)
    shed: int = 0
    most_let_in: int = 0

    @property
    def attainment(self) -> float:
        in_time = sum(ttft_s <= SLO_S for ttft_s in self.ttfts_s)
        return in_time / (len(self.ttfts_s) + self.shed)


def arrivals(per_s: float) -> list[float]:
    """Poisson, the same for every number of gateways."""
    rng, at_s, times = random.Random(7), 0.0, []
    for _ in range(ARRIVALS):
        at_s += rng.expovariate(per_s)
        times.append(at_s)
    return times


def gates(pool: Pool, count: int, known: GatewayShare, **bounds: int) -> list[Gate]:
    loop = asyncio.get_running_loop()
    return [
        Gate(
            AdmissionPolicy(SLO_S, **bounds),
            per_engine=PER_ENGINE,
            fair_keys=True,
            curves=lambda: pool.curves,
            engines=lambda: known,
            now=loop.time,
        )
        for _ in range(count)
    ]


async def served(
    pool: Pool, load: float, gateways: int, known: GatewayShare, shared: bool
) -> Outcome:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    own = gates(pool, gateways, known)
    async with AsyncExitStack() as stack:
        doors: Sequence[AdmissionGate] = own
        let_in_by = own
        if shared:
            gate = shared_gate(AdmissionPolicy(SLO_S), PER_ENGINE)
            view = View(pool.curves, known)
            doors = [
                await stack.enter_async_context(connected(gate, each, name, view))
                for name, each in enumerate(own)
            ]
            let_in_by = [gate.gate]
        return await storm(pool, load, doors, let_in_by, started_s)


async def storm(
    pool: Pool,
    load: float,
    doors: Sequence[AdmissionGate],
    let_in_by: Sequence[Gate],
    started_s: float,
) -> Outcome:
    loop = asyncio.get_running_loop()
    speculators, prefills = asyncio.Semaphore(SPECULATORS), asyncio.Semaphore(pool.prefills)
    outcome = Outcome()

    async def ask(gate: AdmissionGate, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - (loop.time() - started_s)))
        came_s = loop.time()
        request = Request("r", PROMPT, b"", timeout_s=30.0)
        plan = Plan(PlanKind.PRUNE, Reason.DEFAULT, KEEP)
        try:
            slot = await gate.enter(RequestSummary.of(request, plan, FLOOR))
            let_in = sum(each.running for each in let_in_by)
            outcome.most_let_in = max(outcome.most_let_in, let_in)
            async with speculators:
                await asyncio.sleep(pool.curves.speculate.seconds(len(PROMPT)))
            async with prefills:
                await asyncio.sleep(pool.curves.prefill.seconds(slot.plan.keep * len(PROMPT)))
            slot.record_first_token()
            outcome.ttfts_s.append(loop.time() - came_s)
            outcome.keeps.append(slot.plan.keep)
        except (Overloaded, DeadlineExceeded):
            outcome.shed += 1

    times = enumerate(arrivals(load * pool.sustained_per_s))
    await asyncio.gather(*(ask(doors[turn % len(doors)], at_s) for turn, at_s in times))
    return outcome


def run(
    load: float, gateways: int, pool: Pool = FOUR, *, divided: bool = True, shared: bool = False
) -> Outcome:
    known = GatewayShare(SPECULATORS, pool.prefills, gateways if divided else 1)
    return run_in_virtual_time(served(pool, load, gateways, known, shared))


@pytest.mark.parametrize("pool", [FOUR, ONE], ids=["four engines", "one engine"])
@pytest.mark.parametrize("load", [1.0, 10.0])
@pytest.mark.parametrize("gateways", [2, 16])
def test_gateways_with_one_gate_serve_as_many_in_time_as_one(gateways, load, pool):
    several, one = run(load, gateways, pool, shared=True), run(load, 1, pool)
    assert several.attainment == pytest.approx(one.attainment, abs=0.01)
    assert several.most_let_in <= pool.max_let_in


@pytest.mark.parametrize("pool", [FOUR, ONE], ids=["four engines", "one engine"])
@pytest.mark.parametrize("load", [0.8, 1.0, 1.5, 10.0])
def test_two_gateways_serve_as_many_in_time_as_one(load, pool):
    two, one = run(load, 2, pool), run(load, 1, pool)
    assert two.attainment > one.attainment - 0.05
    assert two.most_let_in <= pool.max_let_in


@pytest.mark.parametrize("load", [0.8, 1.0, 1.5])
def test_four_gateways_lose_little(load):
    four, one = run(load, 4), run(load, 1)
    assert four.attainment > one.attainment - 0.1
    assert four.most_let_in <= FOUR.max_let_in


def test_one_gateway_meets_the_slo_at_half_as_much_again_as_the_pool_sustains():
    assert run(1.5, 1).attainment > 0.95


def test_more_gateways_than_engines_take_fractions_of_them():
    divided, undivided = run(1.5, 16), run(1.5, 16, divided=False)
    assert divided.attainment > undivided.attainment + 0.2
    assert divided.most_let_in == 16  # one each, for a part of the time


def test_the_wait_behind_other_gateways_is_learnt():
    blind = run(1.5, 2, divided=False)
    assert blind.attainment > 0.6  # 0.03 without


async def held_by(gate: Gate, key: str) -> None:
    request = Request("r", PROMPT, b"", key=key)
    slot = await gate.enter(
        RequestSummary.of(request, Plan(PlanKind.PRUNE, Reason.DEFAULT, KEEP), FLOOR)
    )
    try:
        await asyncio.Event().wait()
    finally:
        slot.release()


async def waiting_in_all(gateways: int, keys: int, **bounds: int) -> tuple[int, int]:
    """Overload all gates; return the number of waiting and of shed requests."""
    fronts = gates(ONE, gateways, GatewayShare(1, 1, gateways), **bounds)
    tasks = [
        asyncio.create_task(held_by(fronts[turn % gateways], f"key {turn // gateways % keys}"))
        for turn in range(200)
    ]
    await asyncio.sleep(0.01)
    shed = sum(task.done() and isinstance(task.exception(), Overloaded) for task in tasks)
    waiting = sum(front.waiting for front in fronts)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return waiting, shed


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_the_bounds_of_the_queue_hold_over_all_gateways(gateways):
    bounds = {"max_waiting": 40, "max_waiting_per_key": 40}
    waiting, shed = run_in_virtual_time(waiting_in_all(gateways, 5, **bounds))
    assert waiting <= 2 * 40  # as many late ones as others, at most
    assert shed >= 200 - 2 * 40 - 4


@pytest.mark.parametrize("gateways", [1, 2, 4])
def test_the_bound_of_a_key_holds_over_all_gateways(gateways):
    bounds = {"max_waiting": 1000, "max_waiting_per_key": 8}
    waiting, _ = run_in_virtual_time(waiting_in_all(gateways, 2, **bounds))
    assert waiting == 2 * 8
