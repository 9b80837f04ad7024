"""A speculator's passes in the simulator, beside the schedule that the service runs."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.control.scaling.values import Engines, Pool, Slo
from specprefill.control.stages import Curve, StageCurves
from specprefill.lab.simulation.controllers import Fixed
from specprefill.lab.simulation.machine import Machine
from specprefill.lab.simulation.run import simulate
from specprefill.lab.simulation.steps import StepLimits
from specprefill.lab.simulation.trace import Trace
from specprefill.lab.simulation.world import ReplicaFailure, World
from specprefill.speculator.jobs import Job
from specprefill.speculator.schedule import Limits, next_reading
from specprefill.speculator.translation import SamePrompt
from tests.unit.speculator.gated_scorer import PLAN, POLICY

TOKEN_S = 0.001
PASS = StepLimits(tokens=500, prompts=4, shortest_first=True)
READING = Engines(StageCurves(Curve(0.0, TOKEN_S), Curve(), Curve(), Curve()), 0.0, decode_slots=9)
WORLD = World(
    READING, Slo(ttft_s=5.0), dict.fromkeys(Pool, 10.0), min_prompt_tokens=1, passes=PASS,
    timeout_s=1000.0,
)  # fmt: skip


def prompts(*arrivals: tuple[float, float]) -> Trace:
    times, tokens = zip(*arrivals, strict=True)
    return Trace(np.array(times), np.array(tokens), np.ones(len(arrivals)))


def read_at(trace: Trace, world: World = WORLD, speculators: int = 1) -> list[float]:
    """Return when each prompt is read to its end."""
    pools = {Pool.SPECULATOR: speculators, Pool.PREFILL: 1, Pool.DECODE: 9}
    one_each = dict.fromkeys(Pool, 1) | {Pool.DECODE: 9}
    outcome = simulate(trace, world, Fixed(one_each), pools)
    return (trace.time_s + outcome.ttft_s).tolist()


def test_a_short_prompt_goes_before_the_rest_of_a_long_one():
    trace = prompts((0.0, 4000.0), (0.1, 1500.0))
    assert read_at(trace) == pytest.approx([5.5, 2.0])
    assert read_at(trace, replace(WORLD, passes=None)) == pytest.approx([4.0, 5.5])


def test_a_long_prompt_waits_for_twice_its_own_tokens_of_shorter_ones_at_most():
    crowd = [(0.5 + 0.1 * place, 150.0) for place in range(200)]  # more than a speculator can read
    long_s, *short_s = read_at(prompts((0.0, 2000.0), *crowd))
    assert long_s <= 2.0 + 2 * 2.0 + 1.0
    assert max(short_s) > long_s


def test_a_prompt_alone_takes_the_time_of_its_curve_in_any_number_of_passes():
    curve = Curve(0.5, TOKEN_S, 1e-7)
    engines = replace(READING, curves=replace(READING.curves, speculate=curve))
    for limits in (None, PASS, replace(PASS, tokens=5000)):
        found = read_at(prompts((0.0, 1700.0)), replace(WORLD, engines=engines, passes=limits))
        assert found == pytest.approx([curve.seconds(1700.0)])


@pytest.mark.parametrize("machine", [None, Machine(2.0)])
def test_prompts_of_a_dead_speculator_are_read_again(machine):
    failures = (ReplicaFailure(0.6, Pool.SPECULATOR),)
    world = replace(WORLD, failures=failures, machine=machine)
    trace = prompts((0.0, 4000.0), (0.1, 4000.0), (0.2, 1500.0))
    found = read_at(trace, world, speculators=2)
    assert not np.isnan(found).any()


@settings(max_examples=60)
@given(
    st.lists(
        st.tuples(st.integers(0, 4000), st.integers(10, 3000)),
        min_size=1,
        max_size=12,
        unique_by=lambda each: each[0],
    ),
    st.integers(1, 4),
)
def test_prompts_are_read_as_the_service_reads_them(arrivals, places):
    arrivals = sorted(arrivals)
    limits = replace(PASS, prompts=places)
    apart = [  # no arrival at a pass's end
        (at / 1000.0 + place * 1e-5, float(tokens)) for place, (at, tokens) in enumerate(arrivals)
    ]
    trace = prompts(*apart)
    found = read_at(trace, replace(WORLD, passes=limits))
    assert found == pytest.approx(_service(trace, Limits(limits.tokens, places, 1 << 40)))


class _Reading:
    def __init__(self, tokens: int) -> None:
        self.unread_tokens = tokens


def _service(trace: Trace, limits: Limits) -> list[float]:
    """Return when the service's own schedule has read each prompt."""
    loop = asyncio.new_event_loop()
    try:
        jobs = [
            Job(None, PLAN, POLICY, 0.0, loop.create_future(), SamePrompt((1,) * (int(n) + 1)))
            for n in trace.prompt_tokens
        ]
        return _read(jobs, trace.time_s.tolist(), limits)
    finally:
        loop.close()


def _read(jobs: list[Job], times_s: list[float], limits: Limits) -> list[float]:
    now_s, read, ends_s = 0.0, 0, dict.fromkeys(range(len(jobs)), 0.0)
    coming = list(range(len(jobs)))
    queue: list[Job] = []
    begun: list[Job] = []
    while coming or queue or begun:
        if not queue and not begun:
            now_s = max(now_s, times_s[coming[0]])
        while coming and times_s[coming[0]] <= now_s:
            jobs[coming[0]].queued_at = read
            queue.append(jobs[coming.pop(0)])
        room, took = limits.chunk_tokens, 0
        for job in next_reading(begun, queue, limits, lambda _job: 1):
            if job.reading is None:
                queue.remove(job)
                job.reading = _Reading(job.unread_tokens)
                begun.append(job)
            tokens = min(room, job.unread_tokens)
            job.reading.unread_tokens -= tokens
            job.read_tokens += tokens
            room, took = room - tokens, took + tokens
        arriving = [one for one in coming if times_s[one] <= now_s + took * TOKEN_S]
        for one in arriving:  # while the pass runs: it counts at its end
            jobs[one].queued_at = read
            queue.append(jobs[one])
            coming.remove(one)
        now_s, read = now_s + took * TOKEN_S, read + took
        for job in [each for each in begun if each.is_read]:
            ends_s[jobs.index(job)] = now_s
            begun.remove(job)
    return list(ends_s.values())
