"""One load from several client processes, to a server that answers at once."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import psutil
import pytest

from specprefill.lab.loadtest import session
from specprefill.lab.loadtest.arrivals import times
from specprefill.lab.loadtest.client_process import (
    EXPECTED,
    CannotRun,
    Prepare,
    framed,
    read_answer,
    serve,
)
from specprefill.lab.loadtest.outcome import RequestEnding
from specprefill.lab.loadtest.processes import MODULE, ClientLost, client_processes
from specprefill.lab.loadtest.scenario import Scenario

PROCESSES, REQUESTS = 2, 32
CHUNK = b'data: {"choices": [{"delta": {"content": "hello"}}]}\n\n'
BODY = CHUNK + b"data: [DONE]\n\n"


class Service:
    """Answers every request alike, and keeps what was asked; it can refuse or never answer."""

    def __init__(self, status: int = 200, *, silent: bool = False) -> None:
        self._status = status
        self._silent = silent
        self.asked: list[dict[str, Any]] = []

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (
            int(line.partition(b":")[2])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length")
        )
        self.asked.append(json.loads(await reader.readexactly(length)))
        if self._silent:
            await reader.read()  # until the client is gone
        else:
            writer.write(
                f"HTTP/1.1 {self._status} X\r\ncontent-length: {len(BODY)}\r\n"
                "connection: close\r\n\r\n".encode()
                + BODY
            )
        writer.close()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        async with server:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"


def scenario(address: str, **fields: Any) -> Scenario:
    return Scenario.model_validate({
        "target": {"address": address, "model": "demo"},
        "tokenizer": "models/demo-main",
        "prompts": [{"prompt_tokens": 300}, {"prompt_tokens": 300, "keep": "dense"}],
        "arrivals": {"kind": "poisson", "qps": 100.0},
        "length": {"requests": REQUESTS},
        "processes": PROCESSES,
        "seed": 5,
        **fields,
    })  # fmt: skip


def clients() -> list[psutil.Process]:
    return [each for each in psutil.Process().children() if MODULE in each.cmdline()]


async def test_the_parts_are_one_load_and_faults_are_told():
    """One test: a client process takes seconds to start."""
    service, refusing, silent = Service(), Service(401), Service(silent=True)
    reported: list[int] = []
    async with (
        service.running() as address,
        refusing.running() as refused,
        silent.running() as unanswered,
        client_processes(
            scenario(address), lambda progress: reported.append(progress.answered)
        ) as measure,
    ):
        assert len(clients()) == PROCESSES
        asked = scenario(address, conversation={"turns": 2, "think_s": 0.0})
        run, again = [await measure(asked) for _ in range(2)]
        assert {one.stream.ending for one in run.outcomes} == {RequestEnding.ANSWERED}
        assert [one.index for one in run.outcomes] == list(range(2 * REQUESTS))
        first = [one for one in run.outcomes if one.variant.endswith("turn 1")]
        planned = times(asked.arrivals, asked.length, np.random.default_rng(asked.seed))
        assert [one.scheduled_s for one in first] == pytest.approx(list(planned))
        assert all(one.lag_s >= 0 for one in first)
        assert reported[-1] == 2 * REQUESTS
        assert run.summary.requests == len(again.outcomes) == 2 * REQUESTS
        # Beside the warm-up, which is always the same, no prompt came twice.
        assert len({str(each["messages"]) for each in service.asked}) == 4 * REQUESTS + 1

        closed = {"kind": "concurrency", "clients": 3}
        run = await measure(scenario(address, arrivals=closed))
        assert len(run.outcomes) == REQUESTS

        with pytest.raises(session.NotReady, match="401"):
            await measure(scenario(refused))
        lost = asyncio.ensure_future(measure(scenario(unanswered, warm_up=0)))
        while not silent.asked:
            assert not lost.done()
            await asyncio.sleep(0.05)
        os.kill(clients()[0].pid, signal.SIGKILL)
        with pytest.raises(ClientLost, match=r"client process \d of 2 ended with status -9"):
            await lost
    assert clients() == []


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"tokenizer": "{folder}"}, "UnknownTokenizer"),
        ({"arrivals": {"kind": "trace", "path": "{folder}/none.jsonl"}}, "InvalidFile"),
    ],
)
async def test_what_cannot_be_read_is_told(tmp_path, fields, error):
    text = scenario("http://127.0.0.1:9/v1", **fields).model_dump_json()
    reader, answers = asyncio.StreamReader(), asyncio.StreamReader()
    asked = Prepare(text.replace("{folder}", str(tmp_path)).encode(), 1, 2)
    reader.feed_data(framed(asked))
    reader.feed_eof()
    await serve(reader, answers.feed_data)
    answer = await read_answer(answers)
    assert isinstance(answer, CannotRun)
    assert answer.error == error
    assert EXPECTED[error](answer.message)


def test_there_are_no_more_processes_than_clients():
    with pytest.raises(ValueError, match="2 processes need as many clients, not 1"):
        scenario("http://127.0.0.1:9/v1", arrivals={"kind": "concurrency", "clients": 1})
