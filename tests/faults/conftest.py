"""Pools of real engine processes that can be killed, and a table of what became of each fault."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from specprefill.bench.report import provenance, write_json
from specprefill.errors import PrefillUnavailable, Unavailable
from specprefill.kv.rpc import KvPeers
from specprefill.pipeline import Pipeline
from specprefill.plan import Planner
from specprefill.types import Prefilled, Request, Selection, Ticket

# The tiny random model and the environment of engines on CPUs.
from tests.integration.conftest import BLOCK_SIZE, model_dir  # noqa: F401


class Member:
    """One engine of a pool: its service, its process, and how to replace it."""

    def __init__(self, make) -> None:
        self._make = make

    async def start(self) -> None:
        before = set(psutil.Process().children(recursive=True))
        self.service = self._make()
        await self.service.start()
        born = set(psutil.Process().children(recursive=True)) - before
        self.process = max(born, key=lambda process: process.memory_info().rss)
        self.alive = True

    def signal(self, number: int) -> None:
        """Send a signal to the engine process."""
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.signal(signal.SIGKILL)

    def lives(self) -> bool:
        """Whether the engine process is there at all."""
        try:
            return self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    async def replace_if_dead(self) -> None:
        """A pool's controller would start a new replica."""
        try:
            await self.service.check_health()
        except Unavailable:
            await self.service.close()
            await self.start()


@dataclass
class Pools:
    """Two prefill and two decode engines behind the pipeline's ports."""

    prefills: list[Member]
    decodes: list[Member]
    peers: KvPeers
    on_ticket: object = None  # called with each ticket, may replace it
    on_step: object = None  # called with each decode step
    tickets: list[Ticket] = field(default_factory=list)

    @asynccontextmanager
    async def prefill(self, request, selection, timeout_s) -> AsyncIterator[Prefilled]:
        """The `Prefiller` port: the first engine that is not known dead."""
        prefilled = await self._first_alive(
            self.prefills, lambda service: service.prefill(request, selection, timeout_s)
        )
        if prefilled.ticket is not None:
            self.tickets.append(prefilled.ticket)
        try:
            yield await self._hooked(prefilled)
        finally:
            if prefilled.ticket is not None:
                await self.peers.release(prefilled.ticket)

    async def decode(self, request, selection, ticket, replay, timeout_s):
        """The `Decoder` port: the first engine that is not known dead."""
        member = next(member for member in self.decodes if member.alive)
        try:
            async for step in member.service.decode(request, selection, ticket, replay, timeout_s):
                yield step
                if self.on_step is not None:
                    await self.on_step(member, step)
        except Unavailable:
            member.alive = False
            raise

    async def _first_alive(self, members, call):
        member = next((member for member in members if member.alive), None)
        if member is None:
            raise PrefillUnavailable("every engine of the pool is dead")
        try:
            return await call(member.service)
        except PrefillUnavailable:
            member.alive = False
            raise

    async def _hooked(self, prefilled: Prefilled) -> Prefilled:
        return prefilled if self.on_ticket is None else await self.on_ticket(prefilled)

    async def restore(self) -> None:
        """Bring every engine back."""
        self.on_ticket = self.on_step = None
        for member in (*self.prefills, *self.decodes):
            await member.replace_if_dead()
            member.alive = True

    async def bytes_held(self) -> int:
        """KV held by the living prefill engines."""
        gauges = [
            gauge
            for member in self.prefills
            if member.lives()
            for gauge in await member.service.gauges()
        ]
        return sum(gauge.bytes_held for gauge in gauges)


@dataclass
class Row:
    """What became of one fault."""

    fault: str
    recovered: str
    seconds: float
    tokens_equal: bool | None  # None: nothing to compare
    bytes_held_after: int

    def equal(self) -> str:
        """As the table shows it."""
        return {True: "yes", False: "NO", None: "-"}[self.tokens_equal]


class Table:
    """Printed at the end of the run, and written under `out/`."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, *fields) -> Row:
        row = Row(*fields)
        self.rows.append(row)
        return row

    def write(self) -> None:
        rows = [asdict(row) for row in self.rows]
        write_json(Path("out") / "faults.json", provenance(seed=0), {"rows": rows})

    def lines(self) -> list[str]:
        head = f"{'fault':44} {'recovered':28} {'s':>6}  equal  bytes held"
        return [head] + [
            f"{row.fault:44} {row.recovered:28} {row.seconds:6.2f}  {row.equal():5}  "
            f"{row.bytes_held_after}"
            for row in self.rows
        ]


@pytest.fixture(scope="session")
def table(request):
    table = Table()
    yield table
    table.write()
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line("")
    for line in table.lines():
        reporter.write_line(line)


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def pools(model_dir) -> AsyncIterator[Pools]:  # noqa: F811
    from specprefill.config import EngineConfig, KvConfig, MainModel
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine
    from specprefill.prefill.service import PrefillService

    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        max_num_batched_tokens=256,
    )
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=5.0, lease_s=4.0)

    def member(service, role):
        return Member(lambda: service(Engine(engine_args(model, config, kv, role))))

    prefills = [member(PrefillService, Role.PREFILL) for _ in range(2)]
    decodes = [member(DecodeService, Role.DECODE) for _ in range(2)]
    for one in (*prefills, *decodes):
        await one.start()
    peers = KvPeers()
    yield Pools(prefills, decodes, peers)
    await peers.close()
    for one in (*prefills, *decodes):
        await one.service.close()


@pytest_asyncio.fixture(loop_scope="session")
async def whole(pools) -> AsyncIterator[Pools]:
    """The pools, whole at the beginning of the test and holding nothing."""
    await pools.restore()
    for member in pools.prefills:
        assert await member.service.drain(10.0)
    yield pools


@dataclass(frozen=True)
class FixedSpeculator:
    """Keeps the runs that the test chose."""

    selection: Selection

    async def select(self, _request, _plan, _timeout_s) -> Selection:
        return self.selection


async def ask(pools: Pools, request: Request, selection: Selection) -> tuple[list[int], float]:
    """The product's pipeline over the pools: the tokens of the answer, and the seconds it took."""
    planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=1)
    pipeline = Pipeline(FixedSpeculator(selection), pools, pools, planner)
    started_s = time.monotonic()
    async with asyncio.timeout(90):
        chunks = [chunk async for chunk in pipeline.generate(request)]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    assert chunks[-1].report is not None
    return tokens, time.monotonic() - started_s
