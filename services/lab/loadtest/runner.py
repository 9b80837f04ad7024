"""Sends requests at their times, whatever became of earlier ones: an open loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from .arrivals import Times
from .outcome import RequestEnding, RequestOutcome, Stream
from .recorder import Caller, LoadPrompt, Recorder, RequestRefused
from .scenario import Cancel


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """One request of a run, decided before the run starts."""

    index: int
    at_s: float
    prompt: LoadPrompt
    leave_after_s: float | None = None  # the client cancels then


@dataclass(slots=True)
class RunProgress:
    """The counts of a run so far; a display may read it at any time."""

    total: int
    sent: int = 0
    answered: int = 0
    other: int = 0

    @property
    def in_flight(self) -> int:
        return self.sent - self.answered - self.other

    def count(self, ending: RequestEnding) -> None:
        """Count one request that is over."""
        if ending is RequestEnding.ANSWERED:
            self.answered += 1
        else:
            self.other += 1


def plan(
    times: Times, prompts: Sequence[LoadPrompt], cancel: Cancel | None, rng: np.random.Generator
) -> list[PlannedRequest]:
    """Plan the run's requests; the clients that leave, and when, are drawn here."""
    leaving: list[float | None] = [None] * len(prompts)
    if cancel is not None:
        leaves = rng.random(len(prompts)) < cancel.share
        after_s = rng.uniform(*cancel.after_s, len(prompts))
        leaving = [
            float(after) if leave else None for leave, after in zip(leaves, after_s, strict=True)
        ]
    return [
        PlannedRequest(index, float(at_s), prompt, leave)
        for index, (at_s, prompt, leave) in enumerate(zip(times, prompts, leaving, strict=True))
    ]


async def run(
    planned: Sequence[PlannedRequest],
    caller: Caller,
    timeout_s: float,
    progress: RunProgress,
    now: Callable[[], float] = time.perf_counter,
) -> list[RequestOutcome]:
    """Send every request at its time and wait for all of them. Outcomes keep the plan's order."""
    started_s = now()
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request in planned:
            await asyncio.sleep(max(0.0, started_s + request.at_s - now()))
            tasks.append(group.create_task(_send(request, caller, timeout_s, started_s, now)))
            progress.sent += 1
            tasks[-1].add_done_callback(lambda task: _count(task, progress))
    return [task.result() for task in tasks]


async def stream(
    prompt: LoadPrompt,
    caller: Caller,
    timeout_s: float,
    leave_after_s: float | None = None,
    now: Callable[[], float] = time.perf_counter,
) -> Stream:
    """Ask once. However it ends, the stream holds what had arrived until then."""
    recorder = Recorder(now)
    leaves = leave_after_s is not None and leave_after_s < timeout_s
    patience_s = leave_after_s if leaves else timeout_s
    try:
        async with asyncio.timeout(patience_s):
            await caller.stream(prompt, timeout_s, recorder)
    except TimeoutError:
        if leaves:
            return recorder.finish(RequestEnding.CANCELLED)
        return recorder.finish(
            RequestEnding.TIMED_OUT, f"client: not answered within {timeout_s:g} s"
        )
    except RequestRefused as refusal:
        return recorder.finish(refusal.ending, str(refusal))
    return recorder.finish(RequestEnding.ANSWERED)


async def _send(
    request: PlannedRequest,
    caller: Caller,
    timeout_s: float,
    started_s: float,
    now: Callable[[], float],
) -> RequestOutcome:
    lag_s = now() - started_s - request.at_s
    prompt = request.prompt
    got = await stream(prompt, caller, timeout_s, request.leave_after_s, now)
    return RequestOutcome(
        index=request.index,
        family=prompt.family,
        variant=prompt.variant,
        scheduled_s=request.at_s,
        lag_s=lag_s,
        stream=got,
        score=prompt.score(got.text) if got.ending is RequestEnding.ANSWERED else None,
    )


def _count(task: asyncio.Task[RequestOutcome], progress: RunProgress) -> None:
    if not task.cancelled() and task.exception() is None:
        progress.count(task.result().stream.ending)
