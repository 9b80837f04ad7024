"""One load test from its scenario to its numbers: prompts, warm-up, the run, faults beside it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np

from ...deployment.checked_yaml import InvalidFile
from ...deployment.serve_api import ServeApi
from . import arrivals, runner, search
from . import recorded_trace as trace
from .arrivals import WHOLE, Part
from .chaos import KilledReplica, inject
from .conversations import PlannedTurns
from .grpc_stream import GrpcCaller
from .http_stream import HttpCaller
from .outcome import RequestEnding, RequestOutcome
from .prompt_source import Source
from .recorder import Caller
from .runner import PlannedRequest, RunProgress
from .scenario import Chaos, Scenario, Target
from .statistics import Summary, summarise

ReportProgress = Callable[[RunProgress], None]  # called about once a second
TELL_EVERY_S = 1.0
_DRAWN_AT_ONCE = 16  # prompts of a closed loop


class LoadSender(Protocol):
    """Sends a run's requests, their times counted from `started_s` on; None: from now on."""

    def __call__(
        self,
        caller: Caller,
        timeout_s: float,  # before a client gives up
        progress: RunProgress,
        *,
        started_s: float | None = None,
    ) -> Coroutine[None, None, list[RequestOutcome]]: ...


class NotReady(Exception):
    """The endpoint did not answer the warm-up; the message has its reply."""


@dataclass(frozen=True, slots=True)
class Run:
    """One rate, measured."""

    outcomes: tuple[RequestOutcome, ...]
    summary: Summary
    kills: tuple[KilledReplica, ...] = ()


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A search's trials and the runs behind them, in the order in which they were made."""

    trials: tuple[search.Trial, ...]
    runs: tuple[Run, ...]


Measure = Callable[[Scenario], Awaitable[Run]]  # `measure`, or the same by several processes


async def measure(scenario: Scenario, source: Source, on_progress: ReportProgress) -> Run:
    """Warm up, then send the scenario's requests. Raises NotReady or InvalidFile."""
    load = plan_load(scenario, source)
    caller = caller_of(scenario.target)
    async with caller.open():
        await warm_up(scenario, source, caller)
        return await run_beside_faults(
            scenario, partial(load, caller, scenario.timeout_s), on_progress
        )


def measure_here(source: Source, on_progress: ReportProgress) -> Measure:
    """Return `measure` by this process alone."""
    return partial(measure, source=source, on_progress=on_progress)


async def repeat(scenario: Scenario, measure_one: Measure) -> tuple[Run, ...]:
    """Run the scenario's replicates, each with a seed of its own. Raises as `measure_one`."""
    seeds = range(scenario.seed, scenario.seed + scenario.replicates)
    same = [scenario.model_copy(update={"seed": seed}) for seed in seeds]
    return tuple([await measure_one(each) for each in same])


async def find(scenario: Scenario, measure_one: Measure) -> SearchResult:
    """Run the scenario's search. Raises as `measure_one`."""
    if scenario.search is None:
        raise ValueError("the scenario has no search")
    pause_s = scenario.search.pause_s if scenario.search.kind == "paper" else 0.0
    runs: list[Run] = []
    trials = search.trials_of(scenario.search)
    load = next(trials)
    while True:
        runs.append(await measure_one(scenario.at_load(load)))
        try:
            load = trials.send(runs[-1].summary)
        except StopIteration as ended:
            return SearchResult(tuple(ended.value), tuple(runs))
        await asyncio.sleep(pause_s)


def caller_of(target: Target) -> Caller:
    """Return a caller of a scenario's target."""
    key = os.environ.get(target.api_key_variable)
    kind = HttpCaller if target.protocol == "http" else GrpcCaller
    return kind(target.address, target.model, key)


def plan_load(scenario: Scenario, source: Source, part: Part = WHOLE) -> LoadSender:
    """Decide on a part's requests in an open loop; on those of a closed one as they are needed.

    Raises InvalidFile, also where no request at all falls into the run.
    """
    process, rng = scenario.arrivals, np.random.default_rng(scenario.seed)
    if isinstance(process, arrivals.Concurrency):
        requests = _draw_on_demand(scenario, source, _own(rng, part), part)
        clients = part.share(process.clients)
        return partial(runner.run_clients, requests, clients, scenario.length.seconds)
    mine = slice(part.place, None, part.of)
    if isinstance(process, arrivals.RecordedTrace):
        lines = trace.read(Path(process.path), scenario.length.requests or 0)[mine]
        times = np.array([line.time_s / process.speed for line in lines])
        rng = _own(rng, part)
        prompts = source.draw_like(scenario.prompts, lines, rng, scenario.seed)
    else:
        times = arrivals.times(process, scenario.length, rng)  # the same in every part
        if not len(times):
            raise InvalidFile(
                f"length.seconds ({scenario.length.seconds:g}) is so short that seed "
                f"{scenario.seed} draws no request; take more seconds, a higher rate or "
                "length.requests"
            )
        times = times[mine]
        rng = _own(rng, part)
        prompts = source.draw(scenario.prompts, len(times), rng)
    planned = _plan_turns(scenario, source, runner.plan(times, prompts, scenario.cancel, rng))
    return partial(runner.run, planned)


def _own(rng: np.random.Generator, part: Part) -> np.random.Generator:
    """Return the generator of a part's own draws."""
    return rng if part == WHOLE else rng.spawn(part.of)[part.place]


def _draw_on_demand(
    scenario: Scenario, source: Source, rng: np.random.Generator, part: Part
) -> Iterator[PlannedRequest]:
    """Yield a part's requests of a closed loop, endlessly where the scenario gives no number."""
    asked = scenario.length.requests
    left = None if asked is None else part.share(asked)
    while left is None or left > 0:
        count = _DRAWN_AT_ONCE if left is None else min(left, _DRAWN_AT_ONCE)
        left = None if left is None else left - count
        prompts = source.draw(scenario.prompts, count, rng)
        planned = runner.plan(np.zeros(count), prompts, scenario.cancel, rng)
        yield from _plan_turns(scenario, source, planned)


def _plan_turns(
    scenario: Scenario, source: Source, planned: Sequence[PlannedRequest]
) -> list[PlannedRequest]:
    """Let the scenario's conversation follow each request."""
    if scenario.conversation is None:
        return list(planned)
    turns = source.conversations(scenario.conversation, len(planned))
    return [_first_turn(each, more) for each, more in zip(planned, turns, strict=True)]


def _first_turn(request: PlannedRequest, turns: PlannedTurns) -> PlannedRequest:
    prompt = replace(request.prompt, variant=f"{request.prompt.variant}, turn 1")
    return replace(request, prompt=prompt, turns=turns)


async def warm_up(scenario: Scenario, source: Source, caller: Caller) -> None:
    """Send each kind of request, one after the other. Raises NotReady."""
    for kind in scenario.prompts:
        for number in range(scenario.warm_up):
            prompt = source.warm_up(kind, number)
            stream = await runner.stream(prompt, caller, scenario.timeout_s)
            if stream.ending is not RequestEnding.ANSWERED:
                raise NotReady(f"{scenario.target.address}: {stream.error}")


async def run_beside_faults(
    scenario: Scenario,
    send: Callable[[RunProgress], Awaitable[list[RequestOutcome]]],
    on_progress: ReportProgress,
) -> Run:
    """Send the requests while the scenario's faults happen."""
    progress = RunProgress()
    kills: list[KilledReplica] = []
    beside = [
        asyncio.create_task(report_often(progress, on_progress)),
        asyncio.create_task(_faults(scenario.chaos, scenario.seed, kills)),
    ]
    try:
        outcomes = await send(progress)
    finally:
        await _stop(beside)
    on_progress(progress)
    return Run(tuple(outcomes), summarise("all", outcomes, scenario.slo), tuple(kills))


async def report_often(progress: RunProgress, on_progress: ReportProgress) -> None:
    """Report about once a second, until cancelled."""
    while True:
        on_progress(progress)
        await asyncio.sleep(TELL_EVERY_S)


async def _faults(chaos: Chaos | None, seed: int, done: list[KilledReplica]) -> None:
    if chaos is not None:
        api = await asyncio.to_thread(ServeApi, chaos.dashboard)
        await inject(chaos.kills, api, random.Random(seed), done)


async def _stop(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Cancel the tasks that still run. Raises what had failed before."""
    for task in tasks:
        task.cancel()
    for ended in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(ended, Exception):
            raise ended
