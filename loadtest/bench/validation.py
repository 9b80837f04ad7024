"""The simulator beside the app that it simulates: `make bench-validation`.

A short calibration asks the local app single questions, and some at once, and learns its stage
times and how its threads slow each other. Then the load tester sends one seeded trace (Poisson
arrivals, mixed lengths), and the simulator is given the same arrivals, lengths and kept tokens.
The calibration is repeated behind it, and both count: a machine that is shared with others does
not keep its speed. How much its busy cores slow each other while the trace runs is taken from the
core-seconds that the trace takes, a machine that is slower meanwhile included, and nothing from
when a request was answered.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import nan
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from specprefill.config import AppConfig, local_path
from specprefill.control.scaling.sizing import stage_times
from specprefill.control.scaling.values import Floats, Pool, Slo
from specprefill.deployment.file import load
from specprefill.lab.loadtest import session
from specprefill.lab.loadtest.arrivals import RecordedTrace as TraceArrivals
from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.scenario import Prompts, Scenario, Target
from specprefill.lab.loadtest.session import Run
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.lab.simulation.controllers import Fixed
from specprefill.lab.simulation.machine import Machine
from specprefill.lab.simulation.run import simulate
from specprefill.lab.simulation.steps import StepLimits
from specprefill.lab.simulation.trace import Lengths, Rate, Trace, generate, poisson, write_trace
from specprefill.lab.simulation.world import World
from specprefill.speculator.scorer import CHUNK_TOKENS

from .calibration import PROMPTS, SLOWEST, AppCalibration, fit, sample
from .processes import Watch
from .servers import RunningServer, run_ours

OUT = Path("out")
BASE = "cluster/local.yaml"
LENGTHS = Lengths(prompt_tokens=2400.0, prompt_spread=0.7, output_tokens=12.0, output_spread=0.3)
SHORTEST, LONGEST = 512, 7600
TIMEOUT_S = 120.0
KEEP = 0.3
FULL = "simulator"
SIZES = dict.fromkeys(Pool, 1)
PERCENTILES = (50, 95)
PRECISION = 0.005  # of a thread's speed beside others


@dataclass(frozen=True, slots=True)
class PercentilePair:
    """One percentile of the time to first token."""

    percentile: int
    measured_s: float
    simulated_s: float

    @property
    def ratio(self) -> float:
        """Simulated over measured; above 1, the simulator is too slow."""
        return self.simulated_s / self.measured_s


def world(
    found: AppCalibration, config: AppConfig, others: tuple[tuple[float, float], ...]
) -> World:
    """Return the local app for the simulator: its stages, its steps, one machine under all.

    `others`: from when on, how many cores other programs were seen to take.
    """
    engine, reader = config.prefill, config.speculator
    if engine.max_num_batched_tokens is None or engine.max_num_seqs is None:
        raise ValueError("prefill: max_num_batched_tokens and max_num_seqs must be given")
    return World(
        found.engines,
        Slo(ttft_s=TIMEOUT_S),
        dict.fromkeys(Pool, 1.0),
        timeout_s=TIMEOUT_S,
        front=found.front,
        passes=StepLimits(
            reader.prefill_chunk_tokens or CHUNK_TOKENS[False],
            reader.max_batch,
            shortest_first=True,
        ),
        steps=StepLimits(engine.max_num_batched_tokens, engine.max_num_seqs),
        machine=found.machine,
        aside=found.aside,
        others=others,
    )


def slowed_as(trace: Trace, shared: World, calibrated: Machine, core_s: float) -> Machine:
    """Return the machine whose busy cores slow each other so that the trace takes `core_s`.

    Within the limits of a calibration. The same work takes the more core-seconds, the more they do.
    """
    slowest, fastest = SLOWEST, 1.0
    while fastest - slowest > PRECISION:
        middle = replace(calibrated, together=(slowest + fastest) / 2.0)
        simulated = simulate(trace, replace(shared, machine=middle), Fixed(SIZES), SIZES)
        if simulated.core_s > core_s:
            slowest = middle.together
        else:
            fastest = middle.together
    return replace(calibrated, together=fastest)


def sustainable_qps(trace: Trace, found: AppCalibration, keep: float) -> float:
    """Return the rate at which the busiest pool, or the machine, is always busy."""
    times = stage_times(trace.arrivals(keep), found.engines)
    outside_s = float(
        np.mean(
            [found.front.seconds(n) + found.aside.seconds(n) for n in trace.prompt_tokens.tolist()]
        )
    )
    pools_s = (float(times.speculate_s.mean()), float(times.prefill_s.mean()))
    together = found.machine.cores * found.machine.together
    machine_s = (outside_s + sum(pools_s) + float(times.decode_s.mean())) / together
    return 1.0 / max(*pools_s, machine_s)


def draw_trace(rate: Rate, seconds: float, seed: int, shortest: int = SHORTEST) -> Trace:
    """Generate a trace whose lengths the local app sustains."""
    trace = generate(rate, seconds, LENGTHS, seed)
    return replace(trace, prompt_tokens=np.clip(trace.prompt_tokens, shortest, LONGEST))


def replayed_trace(outcomes: Sequence[RequestOutcome]) -> Trace:
    """Return the trace as it was sent. Raises RuntimeError if a request got no answer."""
    for one in outcomes:
        if one.stream.ending is not RequestEnding.ANSWERED or one.stream.report is None:
            raise RuntimeError(f"request {one.index}: {one.stream.ending}: {one.stream.error}")
    return Trace(
        _column(one.scheduled_s for one in outcomes),
        _column(one.report_number("prompt_tokens") for one in outcomes),
        _column(max(1, one.stream.output_tokens) for one in outcomes),
        _column(one.report_number("kept_tokens") for one in outcomes),
    )


def compare(measured_s: Floats, simulated_s: Floats) -> list[PercentilePair]:
    """Return each percentile of both."""
    return [
        PercentilePair(
            each, *(float(np.percentile(times, each)) for times in (measured_s, simulated_s))
        )
        for each in PERCENTILES
    ]


def table(name: str, found: Sequence[PercentilePair]) -> str:
    """Return one line per percentile."""
    headers = (name, "measured", "simulated", "simulated / measured")
    rows = [
        [f"p{each.percentile} TTFT", f"{each.measured_s:.3f} s", f"{each.simulated_s:.3f} s",
         f"{each.ratio:.3f}"]
        for each in found
    ]  # fmt: skip
    return markdown(headers, rows)


def variants(calibrated: World, machine: Machine) -> Mapping[str, World]:
    """Return the simulator, and the same without one of the things that a shared machine adds.

    `machine` is the one that the trace ran on.
    """
    full = replace(calibrated, machine=machine)
    return {
        FULL: full,
        "cores as in the calibration": calibrated,
        "without what others took": replace(full, others=()),
        "without work beside the stages": replace(full, aside=None),
        "one prompt at a time": replace(full, steps=None, passes=None),
        "an accelerator per engine": replace(full, machine=None),
        "stages alone": replace(full, machine=None, steps=None, passes=None, front=None),
    }


async def replay(
    served: RunningServer, path: Path, requests: int, source: Source, seed: int
) -> tuple[Run, Watch]:
    """Send the trace in `path` with the load tester, and watch the machine meanwhile."""
    scenario = Scenario(
        target=Target(address=served.url, model=served.model),
        tokenizer=local_path("models/demo-main"),
        prompts=(Prompts(keep=KEEP, max_tokens=int(LENGTHS.output_tokens)),),
        arrivals=TraceArrivals(kind="trace", path=str(path)),
        length={"requests": requests},
        timeout_s=TIMEOUT_S,
        warm_up=0,  # the calibration was one
        seed=seed,
    )
    watch = Watch()
    with watch.looking():
        run = await session.measure(scenario, source, lambda _progress: None)
    return run, watch


@dataclass(frozen=True, slots=True)
class Measured:
    """A replayed trace, and what the calibrations before and behind it found together."""

    found: AppCalibration
    drift: float  # a question's core-seconds behind the trace, in units of those before it
    run: Run
    watch: Watch


async def measure(args: argparse.Namespace, served: RunningServer, config: AppConfig) -> Measured:
    """Calibrate, choose the rate, replay, and calibrate again."""
    source = Source.load(local_path("models/demo-main"), args.seed)
    caller = session.caller_of(Target(address=served.url, model=served.model))
    slots, output_tokens = config.decode.max_num_seqs or 1, int(LENGTHS.output_tokens)
    async with caller.open():
        before = await sample(source, caller, KEEP, output_tokens)
    found = fit(before, slots)
    print(f"calibrated: {found}", flush=True)
    most = sustainable_qps(draw_trace(poisson(1.0), 1000.0, args.seed), found, KEEP)
    trace = draw_trace(poisson(args.load * most), args.seconds, args.seed)
    print(f"sustainable: {most:.2f} requests/s; asked: {args.load:.0%} of it, {len(trace)} "
          f"requests in {args.seconds:g} s", flush=True)  # fmt: skip
    path = args.out.parent / "validation" / "trace.jsonl"
    write_trace(path, trace)
    run, watch = await replay(served, path, len(trace), source, args.seed)
    async with caller.open():
        after = await sample(source, caller, KEEP, output_tokens, first=PROMPTS)
    drift = after.cpu_s / before.cpu_s
    print(f"calibrated again: a question takes {drift:.2f} times the core-seconds that it took "
          f"before; {fit(after, slots)}", flush=True)  # fmt: skip
    return Measured(fit(before + after, slots), drift, run, watch)


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.validation", description=__doc__
    )
    parser.add_argument("--load", type=float, default=0.6, help="share of what the app can sustain")
    parser.add_argument("--seconds", type=float, default=240.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-validation.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, simulate, print, write."""
    args = options(argv)
    folder = args.out.parent.resolve() / "validation"
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(local_path(BASE))
    config = load(base).file.applications[0].args
    with run_ours(base, folder) as served:
        measured = asyncio.run(measure(args, served, config))
    found, run, watch = measured.found, measured.run, measured.watch
    trace = replayed_trace(run.outcomes)
    measured_s = _column(one.ttft_s for one in run.outcomes)
    rows: dict[str, Any] = {}
    others = tuple((each.from_s, each.others) for each in watch.seen)
    print(f"other programs took {watch.mean_others():.2f} cores, this one "
          f"{fmean(each.own for each in watch.seen):.2f}")  # fmt: skip
    core_s = watch.own_s(idle=len(os.sched_getaffinity(0)) - found.machine.cores)
    calibrated = world(found, config, others)
    machine = slowed_as(trace, calibrated, found.machine, core_s)
    print(f"the trace took {core_s:.0f} core-seconds: busy cores had {machine.together:.2f} "
          f"of their speed alone, {found.machine.together:.2f} in the calibration")  # fmt: skip
    for name, each in variants(calibrated, machine).items():
        outcome = simulate(trace, each, Fixed(SIZES), SIZES)
        result = compare(measured_s, outcome.ttft_s)
        print(f"\n{table(name, result)}", flush=True)
        rows[name] = [asdict(one) | {"ratio": one.ratio} for one in result]
        if name == FULL:
            simulated_s = outcome.ttft_s
    results = {
        "load": args.load,
        "requests": len(trace),
        "other_programs": [asdict(each) for each in watch.seen],
        "calibration": asdict(found),
        "drift": measured.drift,
        "core_s": core_s,
        "together": machine.together,
        "compared": rows,
        "each": [
            {"time_s": one.scheduled_s, "output_tokens": one.stream.output_tokens,
             "measured_s": one.ttft_s, "simulated_s": float(foreseen), **(one.stream.report or {})}
            for one, foreseen in zip(run.outcomes, simulated_s, strict=True)
        ],
    }  # fmt: skip
    write_json(args.out, provenance(args.seed), results)
    print(f"\nwritten to {args.out}")
    return 0


def _column(values: Iterable[float | None]) -> Floats:
    return np.array([nan if value is None else value for value in values], dtype=np.float64)


if __name__ == "__main__":
    sys.exit(main())
