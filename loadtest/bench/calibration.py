"""Measures how fast the app on this machine is, from its own reports of single requests.

Inputs of the simulator: stage curves by the product's own stage models, the cost of
the way from the client to the pools and back, an output token's time, the work of other threads
for a request beside its stages, and the machine's cores.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from specprefill.control.scaling.values import Engines
from specprefill.control.stages import Curve, StageModel, StageModels
from specprefill.lab.loadtest import runner
from specprefill.lab.loadtest.outcome import RequestEnding, Stream
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.recorder import Caller, LoadPrompt
from specprefill.lab.loadtest.scenario import Prompts
from specprefill.lab.simulation.machine import Machine

from .processes import average_between, read_use

LENGTHS = (300, 600, 1200, 2400, 4800, 7600)
ROUNDS = 3
TIMEOUT_S = 120.0
IDLE_S = 5.0  # how long the idle app is watched
SETTLE_S = 0.3  # after an answer, until its request's last work is done
SPIN_S = 1.0  # how long a core is measured
_FRONT = Curve(base_s=0.02, token_s=1e-6)  # a shape to start from
_SPIN_NUMBERS = 4096  # they stay in a core's own cache


@dataclass(frozen=True, slots=True)
class AppCalibration:
    """The cost of the app when nothing disturbs it, and the machine it runs on."""

    engines: Engines
    front: Curve  # before and between the pools
    aside: Curve  # beside the stages: core-seconds that no stage waits for
    machine: Machine


@dataclass(frozen=True, slots=True)
class SingleAnswer:
    """An answer to a question alone, and its cost in core-seconds."""

    stream: Stream
    cpu_s: float


async def calibrate(
    source: Source, caller: Caller, keep: float, output_tokens: int, decode_slots: int
) -> AppCalibration:
    """Ask some questions of each length, one after the other.

    Raises RuntimeError when one is not answered.
    """
    kinds = [Prompts(prompt_tokens=n, keep=keep, max_tokens=output_tokens) for n in LENGTHS]
    for place, kind in enumerate(kinds):  # the first ones pay for what later ones find ready
        await runner.stream(source.warm_up(kind, place), caller, TIMEOUT_S)
    idle = await idle_cores()
    singles = []
    for number in range(1, ROUNDS + 1):
        for place, kind in enumerate(kinds):
            prompt = source.warm_up(kind, number * len(LENGTHS) + place)
            singles.append(await _single(prompt, caller, idle))
    return fit_engines(singles, decode_slots, await asyncio.to_thread(measured_machine, idle))


async def idle_cores() -> float:
    """Return the number of cores that the app keeps busy without any request."""
    before = read_use()
    await asyncio.sleep(IDLE_S)
    return average_between(before, read_use(), 0.0, IDLE_S).own


async def _single(prompt: LoadPrompt, caller: Caller, idle: float) -> SingleAnswer:
    began_s, before = time.perf_counter(), read_use()
    stream = await runner.stream(prompt, caller, TIMEOUT_S)
    await asyncio.sleep(SETTLE_S)
    own_s, seconds = read_use().own_s - before.own_s, time.perf_counter() - began_s
    return SingleAnswer(stream, max(0.0, own_s - idle * seconds))


def fit_engines(
    singles: Sequence[SingleAnswer], decode_slots: int, machine: Machine
) -> AppCalibration:
    """Fit stage curves and the rest to answers to single requests that share no prefix."""
    models, front, aside = StageModels(), StageModel(_FRONT), StageModel(_FRONT)
    token_s = []
    for one in singles:
        stream, report = one.stream, _report(one.stream)
        prompt, kept = report["prompt_tokens"], report["kept_tokens"]
        models.speculate.observe(prompt, report["speculate_s"])
        models.prefill.observe(kept, report["prefill_s"])
        models.transfer.observe(kept, report["transfer_s"])
        models.first_decode.observe(kept, report["first_decode_s"])
        ttft_s, end_s = stream.arrivals_s[0], stream.arrivals_s[-1]
        front.observe(prompt, ttft_s - report["speculate_s"] - report["prefill_s"])
        aside.observe(prompt, one.cpu_s - end_s)
        if stream.output_tokens > 1:
            handed_s = report["transfer_s"] + report["first_decode_s"]
            token_s.append(max(0.0, end_s - ttft_s - handed_s) / (stream.output_tokens - 1))
    engines = Engines(models.curves(), statistics.median(token_s), decode_slots)
    beside = aside.curve if aside.samples_seen > 0 else Curve()
    return AppCalibration(engines, front.curve, beside, machine)


def measured_machine(idle: float) -> Machine:
    """Return the cores that the idle app leaves, and how much all of them slow each other."""
    cores = len(os.sched_getaffinity(0))
    with multiprocessing.get_context("spawn").Pool(cores) as workers:
        alone = workers.apply(spins, (SPIN_S,))
        both = workers.map(spins, [SPIN_S] * cores, chunksize=1)
    return Machine(max(1.0, cores - idle), min(1.0, statistics.fmean(both) / alone))


def spins(seconds: float) -> float:
    """Return the rate at which one thread computes; matrix products would take several threads."""
    numbers = np.linspace(-1.0, 1.0, _SPIN_NUMBERS, dtype=np.float32)
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        np.tanh(numbers)
        count += 1
    return count / (time.perf_counter() - began_s)


def _report(stream: Stream) -> Mapping[str, Any]:
    if stream.ending is not RequestEnding.ANSWERED or stream.report is None:
        raise RuntimeError(f"calibration: {stream.ending}: {stream.error}")
    return stream.report
