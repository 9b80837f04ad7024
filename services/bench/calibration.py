"""How fast the app on this machine is, learnt from its own reports of single requests.

What the simulator is told about it: stage curves by the product's own stage models, what the way
from the client to the pools and back costs, an output token's time, and the machine's cores.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..loadtest import runner
from ..loadtest.outcome import Ending, Stream
from ..loadtest.prompts import Source
from ..loadtest.recorder import Caller
from ..loadtest.scenario import Prompts
from ..scaling.values import Engines
from ..simulation.machine import Machine
from ..stages import Curve, StageModel, StageModels

LENGTHS = (300, 600, 1200, 2400, 4800, 7600)
ROUNDS = 3
TIMEOUT_S = 120.0
IDLE_S = 5.0  # how long other programs are watched
SPIN_S = 1.0  # how long a core is measured
_FRONT = Curve(base_s=0.02, token_s=1e-6)  # a shape to start from
_SPIN_SIZE = 192  # of the square matrices: they stay in a core's own cache


@dataclass(frozen=True, slots=True)
class Calibrated:
    """What the app costs when nothing disturbs it, and what it runs on."""

    engines: Engines
    front: Curve
    machine: Machine


async def calibrate(
    source: Source, caller: Caller, keep: float, output_tokens: int, decode_slots: int
) -> Calibrated:
    """Ask about three questions of each length, one after the other.

    Raises RuntimeError when one is not answered.
    """
    machine = measured_machine()
    streams = []
    for number in range(ROUNDS):
        for place, tokens in enumerate(LENGTHS):
            kind = Prompts(prompt_tokens=tokens, keep=keep, max_tokens=output_tokens)
            prompt = source.warm_up(kind, number * len(LENGTHS) + place)
            streams.append(await runner.stream(prompt, caller, TIMEOUT_S))
    return Calibrated(*learnt(streams[len(LENGTHS) :], decode_slots), machine)


def learnt(streams: Sequence[Stream], decode_slots: int) -> tuple[Engines, Curve]:
    """Stage curves, and the front's, from answers to single requests that share no prefix."""
    models, front = StageModels(), StageModel(_FRONT)
    token_s = []
    for stream in streams:
        report = _report(stream)
        prompt, kept = report["prompt_tokens"], report["kept_tokens"]
        models.speculate.observe(prompt, report["speculate_s"])
        models.prefill.observe(kept, report["prefill_s"])
        models.transfer.observe(kept, report["transfer_s"])
        models.first_decode.observe(kept, report["first_decode_s"])
        ttft_s = stream.ttft_s or 0.0
        front.observe(prompt, ttft_s - report["speculate_s"] - report["prefill_s"])
        if stream.output_tokens > 1:
            handed_s = report["transfer_s"] + report["first_decode_s"]
            decoded_s = stream.arrivals_s[-1] - ttft_s - handed_s
            token_s.append(max(0.0, decoded_s) / (stream.output_tokens - 1))
    return Engines(models.curves(), statistics.median(token_s), decode_slots), front.curve


def measured_machine() -> Machine:
    """The cores that other programs leave, and how much all of them at work slow each other."""
    cores = len(os.sched_getaffinity(0))
    busy = busy_cores(IDLE_S)
    with multiprocessing.get_context("spawn").Pool(cores) as workers:
        alone = workers.apply(spins, (SPIN_S,))
        both = workers.map(spins, [SPIN_S] * cores, chunksize=1)
    return Machine(max(1.0, cores - busy), min(1.0, statistics.fmean(both) / alone))


def spins(seconds: float) -> float:
    """Matrix products per second of one thread."""
    rng = np.random.default_rng(0)
    matrix = rng.random((_SPIN_SIZE, _SPIN_SIZE), dtype=np.float32)
    began_s, count = time.perf_counter(), 0
    while time.perf_counter() - began_s < seconds:
        matrix @ matrix
        count += 1
    return count / (time.perf_counter() - began_s)


def busy_cores(seconds: float) -> float:
    """How many of the machine's cores are at work, on average over `seconds` (Linux)."""
    before = _ticks()
    time.sleep(seconds)
    after = _ticks()
    idle, total = after[0] - before[0], after[1] - before[1]
    return (os.cpu_count() or 1) * (1.0 - idle / max(1, total))


def _ticks() -> tuple[int, int]:
    """The machine's idle and all clock ticks so far, from /proc/stat."""
    with open("/proc/stat", encoding="ascii") as lines:
        numbers = [int(number) for number in next(lines).split()[1:9]]
    return numbers[3] + numbers[4], sum(numbers)


def _report(stream: Stream) -> Mapping[str, Any]:
    if stream.ending is not Ending.ANSWERED or stream.report is None:
        raise RuntimeError(f"calibration: {stream.ending}: {stream.error}")
    return stream.report
