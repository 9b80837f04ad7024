"""Measures how fast the app on this machine is, from its own reports of single requests.

Inputs of the simulator: stage curves by the product's own stage models, the cost of
the way from the client to the pools and back, an output token's time, the work of other threads
for a request beside its stages, and the machine's cores.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
CROWDS, CROWD = 4, 6  # rounds, and questions of one: in turn, then at once
CROWD_TOKENS = 2400
SLOWEST = 0.3  # of a thread's speed alone, while all cores are busy
_FRONT = Curve(base_s=0.02, token_s=1e-6)  # a shape to start from


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


@dataclass(frozen=True, slots=True)
class CrowdCost:
    """What questions cost that were asked at once."""

    alone_s: float  # core-seconds of as many questions of this length, one after the other
    cpu_s: float
    seconds: float  # until the last one was answered


@dataclass(frozen=True, slots=True)
class Samples:
    """What was asked to calibrate the app; of several times, one behind the other."""

    singles: tuple[SingleAnswer, ...]
    crowds: tuple[CrowdCost, ...]
    idle: float  # cores that the app keeps busy without any request

    def __add__(self, other: Samples) -> Samples:
        return Samples(
            self.singles + other.singles,
            self.crowds + other.crowds,
            (self.idle + other.idle) / 2.0,
        )

    @property
    def cpu_s(self) -> float:
        """Return the core-seconds of a question, on average over the lengths."""
        return statistics.fmean(each.cpu_s for each in self.singles)


async def sample(
    source: Source, caller: Caller, keep: float, output_tokens: int, first: int = 0
) -> Samples:
    """Ask some questions of each length in turn, then some of one length in turn and at once.

    `first` numbers the prompts: those of another time must not be in a cache. Raises RuntimeError
    when one is not answered.
    """
    kinds = [Prompts(prompt_tokens=n, keep=keep, max_tokens=output_tokens) for n in LENGTHS]
    numbers = itertools.count(first)
    for kind in kinds:  # the first ones pay for what later ones find ready
        await runner.stream(source.warm_up(kind, next(numbers)), caller, TIMEOUT_S)
    idle = await idle_cores()
    singles = [
        await _single(source.warm_up(kind, next(numbers)), caller, idle)
        for _ in range(ROUNDS)
        for kind in kinds
    ]
    crowded = kinds[LENGTHS.index(CROWD_TOKENS)]
    crowds = []
    for _ in range(CROWDS):
        prompts = [source.warm_up(crowded, next(numbers)) for _ in range(2 * CROWD)]
        crowds.append(await _crowd(prompts[:CROWD], prompts[CROWD:], caller, idle))
    return Samples(tuple(singles), tuple(crowds), idle)


PROMPTS = len(LENGTHS) * (ROUNDS + 1) + 2 * CROWDS * CROWD  # of one `sample`


async def idle_cores() -> float:
    """Return the number of cores that the app keeps busy without any request."""
    before = read_use()
    await asyncio.sleep(IDLE_S)
    return average_between(before, read_use(), 0.0, IDLE_S).own


async def _single(prompt: LoadPrompt, caller: Caller, idle: float) -> SingleAnswer:
    streams, cpu_s, _ = await _cost([prompt], caller, idle)
    return SingleAnswer(streams[0], cpu_s)


async def _crowd(
    in_turn: Sequence[LoadPrompt], at_once: Sequence[LoadPrompt], caller: Caller, idle: float
) -> CrowdCost:
    """Ask some questions one after the other, and right behind them as many of their kind at once.

    So both find a machine of one speed.
    """
    alone = [await _single(each, caller, idle) for each in in_turn]
    streams, cpu_s, seconds = await _cost(at_once, caller, idle)
    for each in (*streams, *(one.stream for one in alone)):
        _report(each)
    return CrowdCost(sum(each.cpu_s for each in alone), cpu_s, seconds)


async def _cost(
    prompts: Sequence[LoadPrompt], caller: Caller, idle: float
) -> tuple[Sequence[Stream], float, float]:
    """Ask at once; return the answers, their core-seconds, and the seconds until the last."""
    began_s, before = time.perf_counter(), read_use()
    asked = (runner.stream(prompt, caller, TIMEOUT_S) for prompt in prompts)
    streams = await asyncio.gather(*asked)
    answered_s = time.perf_counter() - began_s
    await asyncio.sleep(SETTLE_S)
    own_s, seconds = read_use().own_s - before.own_s, time.perf_counter() - began_s
    return streams, max(0.0, own_s - idle * seconds), answered_s


def fit(samples: Samples, decode_slots: int) -> AppCalibration:
    """Fit stage curves and the rest to answers to requests that share no prefix.

    Raises RuntimeError where a question was not answered.
    """
    models, front, aside = StageModels(), StageModel(_FRONT), StageModel(_FRONT)
    token_s = []
    for one in samples.singles:
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
    cores = max(1.0, len(os.sched_getaffinity(0)) - samples.idle)
    machine = Machine(cores, speed_together(samples.crowds, cores))
    return AppCalibration(engines, front.curve, beside, machine)


def speed_together(crowds: Sequence[CrowdCost], cores: float) -> float:
    """Return a thread's speed while all `cores` are busy, of that alone, by the app's own work.

    Cores share caches and memory, so the same work takes more core-seconds beside other work.
    All are taken to be busy or one is: a time T with U core-seconds had (U - T) / (cores - 1) of
    the former.
    """
    seconds = sum(each.seconds for each in crowds)
    used_s = sum(each.cpu_s for each in crowds)
    crowded_s = cores * (used_s - seconds) / (cores - 1.0) if cores > 1.0 else 0.0
    if crowded_s <= 0.0:
        return 1.0
    work_s = sum(each.alone_s for each in crowds) - (used_s - crowded_s)
    return min(1.0, max(SLOWEST, work_s / crowded_s))


def _report(stream: Stream) -> Mapping[str, Any]:
    if stream.ending is not RequestEnding.ANSWERED or stream.report is None:
        raise RuntimeError(f"calibration: {stream.ending}: {stream.error}")
    return stream.report
