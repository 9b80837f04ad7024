"""One load from several client processes, since one process sends only some hundred a second.

Each has its own event loop, tokenizer and connections. Send times are decided for the whole run
and dealt out in turn, so the load is that of one process; prompts are each part's own. All start at
one moment of the machine's monotonic clock.
"""

from __future__ import annotations

import asyncio
import sys
import time
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import TypeVar

import msgspec

from .arrivals import Part
from .client_process import (
    EXPECTED,
    Answer,
    CannotRun,
    Done,
    Prepare,
    Progress,
    Ready,
    Start,
    framed,
    read_answer,
)
from .outcome import RequestOutcome
from .runner import RunProgress, in_order
from .scenario import Scenario
from .session import Measure, ReportProgress, Run, run_beside_faults

MODULE = "specprefill.lab.loadtest.client_process"
AHEAD_S = 0.2  # of the common start: every process has heard of it by then

Wanted = TypeVar("Wanted", bound=msgspec.Struct)
Result = TypeVar("Result")


class ClientLost(Exception):
    """A client process ended; the message says how."""


@dataclass(slots=True)
class _Client:
    """One process, and its counts of the run."""

    process: Process
    part: Part
    progress: RunProgress = field(default_factory=RunProgress)

    async def prepare(self, scenario: Scenario) -> None:
        """Let it plan its part. Raises what that raises there, or ClientLost."""
        self.progress = RunProgress()
        content = scenario.model_dump_json().encode()
        await self._send(Prepare(content, self.part.place, self.part.of))
        await self._receive(Ready)

    async def run(self, at_s: float) -> list[RequestOutcome]:
        """Let it send its part from `at_s` on. Raises ClientLost."""
        await self._send(Start(at_s))
        return (await self._receive(Done)).outcomes

    async def _send(self, message: msgspec.Struct) -> None:
        if self.process.stdin is None:
            raise RuntimeError("a client process has pipes")
        try:
            self.process.stdin.write(framed(message))
            await self.process.stdin.drain()
        except ConnectionError:
            raise await self._lost() from None

    async def _receive(self, kind: type[Wanted]) -> Wanted:
        """Return the next answer of this kind; count the progress before it."""
        while True:
            answer = await self._next()
            if isinstance(answer, kind):
                return answer
            if isinstance(answer, CannotRun):
                raise EXPECTED[answer.error](answer.message)
            if not isinstance(answer, Progress):
                raise TypeError(f"expected {kind.__name__}, not {type(answer).__name__}")
            self.progress = RunProgress(answer.total, answer.sent, answer.answered, answer.other)

    async def _next(self) -> Answer:
        if self.process.stdout is None:
            raise RuntimeError("a client process has pipes")
        try:
            return await read_answer(self.process.stdout)
        except asyncio.IncompleteReadError:
            raise await self._lost() from None

    async def _lost(self) -> ClientLost:
        code = await self.process.wait()
        return ClientLost(
            f"client process {self.part.place + 1} of {self.part.of} ended with status {code}"
        )


@asynccontextmanager
async def client_processes(
    scenario: Scenario, on_progress: ReportProgress
) -> AsyncIterator[Measure]:
    """Hold the scenario's client processes; yield what measures by them, as `session.measure`.

    Measuring raises ClientLost, too.
    """
    async with AsyncExitStack() as running:
        parts = [Part(place, scenario.processes) for place in range(scenario.processes)]
        clients = [await running.enter_async_context(_client(part)) for part in parts]
        yield partial(_measure, clients=clients, on_progress=on_progress)


@asynccontextmanager
async def _client(part: Part) -> AsyncIterator[_Client]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", MODULE, stdin=PIPE, stdout=PIPE,
        start_new_session=True,  # Ctrl-C is this process's: it ends the others
    )  # fmt: skip
    try:
        yield _Client(process, part)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def _measure(
    scenario: Scenario, clients: Sequence[_Client], on_progress: ReportProgress
) -> Run:
    for error in await asyncio.gather(
        *(client.prepare(scenario) for client in clients), return_exceptions=True
    ):
        if error is not None:
            raise error

    def report(_own: RunProgress) -> None:
        on_progress(_sum(client.progress for client in clients))

    async def send(_own: RunProgress) -> list[RequestOutcome]:
        at_s = time.perf_counter() + AHEAD_S
        return in_order(chain(*await _all(client.run(at_s) for client in clients)))

    return await run_beside_faults(scenario, send, report)


async def _all(calls: Iterable[Coroutine[None, None, Result]]) -> list[Result]:
    """Await all of them. Raises the first error, once the others have been cancelled."""
    tasks = [asyncio.create_task(call) for call in calls]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _sum(parts: Iterable[RunProgress]) -> RunProgress:
    total = RunProgress()
    for part in parts:
        total.total += part.total
        total.sent += part.sent
        total.answered += part.answered
        total.other += part.other
    return total
