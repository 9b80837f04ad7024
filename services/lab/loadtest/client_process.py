"""One of several client processes: `processes` starts it and talks to it over its pipes.

Messages are msgpack, each behind its length. The process is told a scenario and its part, plans
and warms up, waits for the start, reports its progress, and returns its outcomes. It ends with its
input.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Coroutine
from contextlib import suppress

import msgspec

from ...deployment.checked_yaml import InvalidFile
from . import session
from .arrivals import Part
from .outcome import RequestOutcome
from .prompt_source import Source, UnknownTokenizer
from .runner import RunProgress
from .scenario import Scenario

LENGTH_BYTES = 4


class Prepare(msgspec.Struct, tag=True):
    """Plan a part of a run, and warm the endpoint up where that is this part's to do."""

    scenario: bytes  # JSON
    place: int
    of: int


class Start(msgspec.Struct, tag=True):
    """Send the requests, their times counted from `at_s` of the machine's monotonic clock."""

    at_s: float


class Ready(msgspec.Struct, tag=True):
    """The part is planned."""


class CannotRun(msgspec.Struct, tag=True):
    """It cannot be: an error of the named class."""

    error: str
    message: str


class Progress(msgspec.Struct, tag=True):
    """The counts of the run so far."""

    total: int
    sent: int
    answered: int
    other: int


class Done(msgspec.Struct, tag=True):
    """The requests' outcomes."""

    outcomes: list[RequestOutcome]


Send = Callable[[RunProgress, float], Coroutine[None, None, list[RequestOutcome]]]
Answer = Ready | CannotRun | Progress | Done
EXPECTED = {kind.__name__: kind for kind in (session.NotReady, InvalidFile, UnknownTokenizer)}
_encode = msgspec.msgpack.Encoder().encode
_requests: msgspec.msgpack.Decoder[Prepare | Start] = msgspec.msgpack.Decoder(Prepare | Start)
_answers: msgspec.msgpack.Decoder[Answer] = msgspec.msgpack.Decoder(Answer)


def framed(message: msgspec.Struct) -> bytes:
    """Return a message behind its length."""
    data = _encode(message)
    return len(data).to_bytes(LENGTH_BYTES, "big") + data


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Return the next answer. Raises asyncio.IncompleteReadError at the end."""
    return _answers.decode(await _read_frame(reader))


async def _read_frame(reader: asyncio.StreamReader) -> bytes:
    """Return the next message. Raises asyncio.IncompleteReadError at the end."""
    length = int.from_bytes(await reader.readexactly(LENGTH_BYTES), "big")
    return await reader.readexactly(length)


async def serve(reader: asyncio.StreamReader, write: Callable[[bytes], None]) -> None:
    """Run one part after the other, until the input ends."""
    source: Source | None = None
    send: Send | None = None
    with suppress(asyncio.IncompleteReadError):
        while True:
            asked = _requests.decode(await _read_frame(reader))
            try:
                if isinstance(asked, Prepare):
                    scenario = Scenario.model_validate_json(asked.scenario)
                    part = Part(asked.place, asked.of)
                    if source is None:  # kept: no prompt comes twice
                        source = Source.load(scenario.tokenizer, scenario.seed, part)
                    send = await _prepare(scenario, source, part)
                    write(framed(Ready()))
                elif send is not None:
                    write(framed(Done(await _send(send, asked.at_s, write))))
            except tuple(EXPECTED.values()) as error:
                write(framed(CannotRun(type(error).__name__, str(error))))


async def _prepare(scenario: Scenario, source: Source, part: Part) -> Send:
    """Plan the part, and warm up if it is the first. Raises one of `EXPECTED`."""
    load = session.plan_load(scenario, source, part)
    caller = session.caller_of(scenario.target)
    if part.place == 0:
        async with caller.open():
            await session.warm_up(scenario, source, caller)

    async def send(progress: RunProgress, at_s: float) -> list[RequestOutcome]:
        async with caller.open():
            return await load(caller, scenario.timeout_s, progress, started_s=at_s)

    return send


async def _send(send: Send, at_s: float, write: Callable[[bytes], None]) -> list[RequestOutcome]:
    """Send the part's requests; write the counts about once a second, and at the end."""

    def report(progress: RunProgress) -> None:
        counts = (progress.total, progress.sent, progress.answered, progress.other)
        write(framed(Progress(*counts)))

    progress = RunProgress()
    reporting = asyncio.create_task(session.report_often(progress, report))
    try:
        outcomes = await send(progress, at_s)
    finally:
        reporting.cancel()
    report(progress)
    return outcomes


async def _serve_pipes(output: int) -> None:
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    with os.fdopen(output, "wb") as pipe:

        def write(data: bytes) -> None:
            pipe.write(data)
            pipe.flush()

        await serve(reader, write)


def main() -> None:
    """Serve the process that started this one."""
    output = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # whatever prints must not get between
    asyncio.run(_serve_pipes(output))


if __name__ == "__main__":
    main()
