"""Sends requests at their times, whatever became of earlier ones: an open loop.

A closed loop, where a client waits for its answer before it asks again, is offered beside it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest

import numpy as np

from .arrivals import Times
from .conversations import PlannedTurns
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
    turns: PlannedTurns | None = None  # that follow it, one when the other is answered

    @property
    def requests(self) -> int:
        """The most requests that come of it."""
        return 1 if self.turns is None else 1 + self.turns.more


@dataclass(slots=True)
class RunProgress:
    """The counts of a run so far; a display may read it at any time."""

    total: int = 0  # planned so far
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
    *,
    started_s: float | None = None,
) -> list[RequestOutcome]:
    """Send every request at its time and wait for all of them, and for the turns that follow.

    Times count from `started_s` on; None: from now on. Outcomes keep the plan's order; first turns
    come before all others.
    """
    progress.total += sum(each.requests for each in planned)
    started_s = now() if started_s is None else started_s
    sender = _Sender(caller, timeout_s, started_s, progress, now, len(planned))
    async with asyncio.TaskGroup() as group:
        tasks = []
        for request in planned:
            await asyncio.sleep(max(0.0, sender.started_s + request.at_s - now()))
            tasks.append(group.create_task(sender.send_all(request)))
    turns = zip_longest(*(task.result() for task in tasks))
    return [outcome for same_turn in turns for outcome in same_turn if outcome is not None]


async def run_clients(
    requests: Iterator[PlannedRequest],
    clients: int,
    seconds: float | None,
    caller: Caller,
    timeout_s: float,
    progress: RunProgress,
    now: Callable[[], float] = time.perf_counter,
    *,
    started_s: float | None = None,
) -> list[RequestOutcome]:
    """Let each client send a request, and the turns that follow, when its last one has ended.

    Ends with `requests`, or begins neither one nor a turn after `seconds`. Their own `at_s` is not
    looked at. They begin at `started_s`; None: now.
    """
    started_s = now() if started_s is None else started_s
    sender = _Sender(caller, timeout_s, started_s, progress, now, 0, seconds)
    await asyncio.sleep(max(0.0, started_s - now()))
    drawing = asyncio.Lock()

    async def client() -> list[RequestOutcome]:
        outcomes: list[RequestOutcome] = []
        while not sender.is_over():
            async with drawing:
                request = await asyncio.to_thread(next, requests, None)
            if request is None:
                break
            progress.total += request.requests
            at_s = now() - sender.started_s
            outcomes += await sender.send_all(replace(request, at_s=at_s))
        return outcomes

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(client()) for _ in range(clients)]
    return in_order(chain(*(task.result() for task in tasks)))


def in_order(outcomes: Iterable[RequestOutcome]) -> list[RequestOutcome]:
    """Return the outcomes by their times, with new indices."""
    ordered = sorted(outcomes, key=lambda one: one.scheduled_s)
    return [replace(outcome, index=index) for index, outcome in enumerate(ordered)]


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


@dataclass(frozen=True, slots=True)
class _Sender:
    """Sends the requests of one run."""

    caller: Caller
    timeout_s: float
    started_s: float
    progress: RunProgress
    now: Callable[[], float]
    conversations: int  # planned requests, each with its turns: the distance of two turns' indices
    seconds: float | None = None  # nothing is begun later

    def is_over(self) -> bool:
        """Return True once nothing may be begun."""
        return self.seconds is not None and self.now() - self.started_s >= self.seconds

    async def send_all(self, request: PlannedRequest) -> list[RequestOutcome]:
        """Send a request and the turns that follow, until one is not answered."""
        outcomes = [await self._send(request)]
        turns = request.turns
        while turns is not None and len(outcomes) <= turns.more:
            got = outcomes[-1].stream
            if got.ending is not RequestEnding.ANSWERED or self.is_over():
                self.progress.total -= turns.more + 1 - len(outcomes)
                break
            await asyncio.sleep(turns.think_s)
            prompt = await asyncio.to_thread(turns.follow_up, request.prompt, got.text)
            request = replace(
                request,
                index=request.index + self.conversations,
                at_s=self.now() - self.started_s,
                prompt=prompt,
                leave_after_s=None,
            )
            outcomes.append(await self._send(request))
        return outcomes

    async def _send(self, request: PlannedRequest) -> RequestOutcome:
        lag_s = self.now() - self.started_s - request.at_s
        self.progress.sent += 1
        prompt = request.prompt
        got = await stream(prompt, self.caller, self.timeout_s, request.leave_after_s, self.now)
        self.progress.count(got.ending)
        return RequestOutcome(
            index=request.index,
            family=prompt.family,
            variant=prompt.variant,
            scheduled_s=request.at_s,
            lag_s=lag_s,
            stream=got,
            score=prompt.score(got.text) if got.ending is RequestEnding.ANSWERED else None,
        )
