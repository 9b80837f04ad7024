"""One load test from its scenario to its numbers: prompts, warm-up, the run, faults beside it."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ...deployment.local_ray import ServeApi
from . import arrivals, runner, search
from . import recorded_trace as trace
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


async def measure(scenario: Scenario, source: Source, on_progress: ReportProgress) -> Run:
    """Warm up, then send the scenario's requests. Raises NotReady or InvalidFile."""
    rng = np.random.default_rng(scenario.seed)
    planned = _plan_run(scenario, source, rng)
    caller = caller_of(scenario.target)
    async with caller.open():
        await _warm_up(scenario, source, caller)
        return await _run(scenario, planned, caller, on_progress)


async def find(scenario: Scenario, source: Source, on_progress: ReportProgress) -> SearchResult:
    """Run the scenario's search."""
    if scenario.search is None:
        raise ValueError("the scenario has no search")
    pause_s = scenario.search.pause_s if scenario.search.kind == "paper" else 0.0
    runs: list[Run] = []
    trials = search.trials_of(scenario.search)
    qps = next(trials)
    while True:
        runs.append(await measure(scenario.at_rate(qps), source, on_progress))
        try:
            qps = trials.send(runs[-1].summary)
        except StopIteration as ended:
            return SearchResult(tuple(ended.value), tuple(runs))
        await asyncio.sleep(pause_s)


def caller_of(target: Target) -> Caller:
    """Return a caller of a scenario's target."""
    key = os.environ.get(target.api_key_variable)
    kind = HttpCaller if target.protocol == "http" else GrpcCaller
    return kind(target.address, target.model, key)


def _plan_run(scenario: Scenario, source: Source, rng: np.random.Generator) -> list[PlannedRequest]:
    process = scenario.arrivals
    if isinstance(process, arrivals.RecordedTrace):
        lines = trace.read(Path(process.path), scenario.length.requests or 0)
        times = np.array([line.time_s / process.speed for line in lines])
        prompts = source.draw_like(scenario.prompts, lines, rng)
    else:
        times = arrivals.times(process, scenario.length, rng)
        prompts = source.draw(scenario.prompts, len(times), rng)
    planned = runner.plan(times, prompts, scenario.cancel, rng)
    if scenario.conversation is None:
        return planned
    turns = source.conversations(scenario.conversation, len(planned))
    return [_first_turn(each, more) for each, more in zip(planned, turns, strict=True)]


def _first_turn(request: PlannedRequest, turns: PlannedTurns) -> PlannedRequest:
    prompt = replace(request.prompt, variant=f"{request.prompt.variant}, turn 1")
    return replace(request, prompt=prompt, turns=turns)


async def _warm_up(scenario: Scenario, source: Source, caller: Caller) -> None:
    """Send each kind of request, one after the other. Raises NotReady."""
    for kind in scenario.prompts:
        for number in range(scenario.warm_up):
            prompt = source.warm_up(kind, number)
            stream = await runner.stream(prompt, caller, scenario.timeout_s)
            if stream.ending is not RequestEnding.ANSWERED:
                raise NotReady(f"{scenario.target.address}: {stream.error}")


async def _run(
    scenario: Scenario,
    planned: Sequence[PlannedRequest],
    caller: Caller,
    on_progress: ReportProgress,
) -> Run:
    progress = RunProgress(sum(each.requests for each in planned))
    kills: list[KilledReplica] = []
    beside = [
        asyncio.create_task(_report_often(progress, on_progress)),
        asyncio.create_task(_faults(scenario.chaos, scenario.seed, kills)),
    ]
    try:
        outcomes = await runner.run(planned, caller, scenario.timeout_s, progress)
    finally:
        await _stop(beside)
    on_progress(progress)
    return Run(tuple(outcomes), summarise("all", outcomes, scenario.slo), tuple(kills))


async def _report_often(progress: RunProgress, on_progress: ReportProgress) -> None:
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
