"""Pools of real engine processes that can be killed, and a table of what became of each fault."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import pytest
import pytest_asyncio

from specprefill.core.errors import Overloaded, PrefillUnavailable, Unavailable
from specprefill.core.fallback import Fallback, OnOverload
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.ports import LocalPrefill
from specprefill.core.types import Carrier, Report, Request, Selection, Ticket
from specprefill.engine.fork_server import FORK_SERVER
from specprefill.kv.keeper_link import KEEPER
from specprefill.kv.leases import UNCLAIMED_S
from specprefill.kv.prefilling import HeldPrefill, hold_prefill
from specprefill.kv.rpc import KvPeers
from specprefill.lab.reporting.tables import markdown, provenance, write_json

# The tiny random model and the environment of engines on CPUs.
from tests.integration.conftest import BLOCK_SIZE, model_dir  # noqa: F401

from ..policies import SHIPPED

RELEASED_S = UNCLAIMED_S / 2  # long before a lease would end by itself
ANSWER_TOKENS = 4000  # they take much longer than that


class Member:
    """One engine of a pool: its service, its process, and how to replace it."""

    def __init__(self, make) -> None:
        self._make = make

    async def start(self) -> None:
        FORK_SERVER.start()  # no process of this engine
        before = set(psutil.Process().children(recursive=True))
        self.service = self._make()
        await self.service.start()
        born = set(psutil.Process().children(recursive=True)) - before
        self.process = max(born, key=lambda process: process.memory_info().rss)
        self._keepers = [
            process
            for process in psutil.process_iter(["cmdline"])
            if KEEPER in (command := process.info["cmdline"] or [])
            and command[-1] == str(self.process.pid)
        ]
        self.alive = True

    def signal(self, number: int) -> None:
        """Send a signal to the engine process, and to the one that serves its KV."""
        os.kill(self.process.pid, number)
        for keeper in self._keepers:
            with suppress(psutil.NoSuchProcess):
                keeper.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: no goodbye."""
        self.signal(signal.SIGKILL)

    def lives(self) -> bool:
        """Return True while the engine process exists."""
        try:
            return self.process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    @property
    def unfinished(self) -> int:
        """Requests that the engine has not finished or aborted."""
        return self.service._engine._running().get_num_unfinished_requests()

    async def replace_if_dead(self) -> None:
        """A pool's controller would start a new replica."""
        try:
            await self.service.check_health()
        except Unavailable:
            await self.service.close()
            await self.start()


class CutOff:
    """Workers that cannot be reached: nothing is renewed or released there."""

    async def renew(self, ticket: Ticket) -> bool:
        return False

    async def release(self, ticket: Ticket) -> None:
        pass


@dataclass
class HookedPrefill:
    """The `Prefilling` port: what the pipeline receives passes through the test's hook."""

    one: HeldPrefill
    pools: Pools

    async def ticket(self):
        return await self._hooked(await self.one.ticket())

    async def result(self):
        return await self._hooked(await self.one.result())

    def kv_arrived(self):
        self.one.kv_arrived()

    async def _hooked(self, step):
        hook, step = self.pools.on_prefill_step, with_carrier(step, self.pools.carrier)
        return step if step is None or hook is None else await hook(step)


def with_carrier(step, carrier):
    """Return the step, with a ticket that offers `carrier`, if one is asked for."""
    if carrier is None or step is None:
        return step
    if isinstance(step, Ticket):
        return replace(step, carrier=carrier)
    return replace(step, ticket=with_carrier(step.ticket, carrier))


@dataclass
class Pools:
    """Two prefill and two decode engines behind the pipeline's ports."""

    prefills: list[Member]
    decodes: list[Member]
    peers: KvPeers
    cut_off: bool = False  # the gateway does not reach the workers that hold KV
    overlap: bool = True  # decode begins to pull before prefill has answered
    carrier: Carrier | None = None  # instead of the best that the engines have
    on_prefill_step: object = None  # called with each Ticket and PrefillResult, may replace it
    on_step: object = None  # called with each decode step

    @asynccontextmanager
    async def prefill(self, request, selection, timeout_s) -> AsyncIterator[HookedPrefill]:
        """The `Prefiller` port: the first engine that is not known dead."""
        leases = CutOff() if self.cut_off else self.peers
        async with (
            aclosing(self._steps(request, selection, timeout_s)) as steps,
            hold_prefill(steps, leases) as one,
        ):
            yield HookedPrefill(one, self)

    async def _steps(self, request, selection, timeout_s):
        member = next((member for member in self.prefills if member.alive), None)
        if member is None:
            raise PrefillUnavailable("every engine of the pool is dead")
        try:
            async with aclosing(member.service.steps(request, selection, timeout_s)) as steps:
                async for step in steps:
                    yield step
        except PrefillUnavailable:
            member.alive = False
            raise

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

    async def restore(self) -> None:
        """Bring every engine back."""
        self.on_prefill_step = self.on_step = None
        self.cut_off, self.overlap, self.carrier = False, True, None
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

    async def released(self, timeout_s: float) -> bool:
        """Wait until no living engine has a request or a lease; False once the time is over."""
        give_up_s = time.monotonic() + timeout_s
        living = [member for member in (*self.prefills, *self.decodes) if member.lives()]
        while time.monotonic() < give_up_s:
            leases = [
                gauge.leases
                for member in self.prefills
                if member in living
                for gauge in await member.service.gauges()
            ]
            if not any(leases) and not any(member.unfinished for member in living):
                return True
            await asyncio.sleep(0.05)
        return False


@dataclass
class Row:
    """The consequences of one fault."""

    fault: str
    recovered: str
    seconds: float
    tokens_equal: bool | None  # None: nothing to compare
    bytes_held_after: int

    def cells(self) -> list[str]:
        """Return the row's cells."""
        equal = {True: "yes", False: "NO", None: "-"}[self.tokens_equal]
        fault = self.fault.replace("_", " ")
        return [fault, self.recovered, f"{self.seconds:.2f}", equal, str(self.bytes_held_after)]


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

    def text(self) -> str:
        """Return the text of docs/faults.md."""
        headers = ("fault", "recovered", "seconds", "tokens equal", "KV bytes held after")
        return markdown(headers, [row.cells() for row in self.rows])


@pytest.fixture(scope="session")
def table(request):
    table = Table()
    yield table
    table.write()
    reporter = request.config.pluginmanager.get_plugin("terminalreporter")
    reporter.write_line("")
    reporter.write_line(table.text())


@pytest_asyncio.fixture(scope="package", loop_scope="session")
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
        max_num_batched_tokens=128,  # a step is not interrupted: what a cancelled one costs
    )
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=5.0, lease_s=6.0)

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
        if one.lives():
            one.kill()  # a friendly end takes vLLM seconds
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


@dataclass(frozen=True)
class FullSpeculator:
    """Takes no prompt."""

    async def select(self, _request, _plan, _timeout_s) -> Selection:
        raise Overloaded("the queue is full", 2.0)


async def ask(
    pools: Pools,
    request: Request,
    selection: Selection,
    on_overload: OnOverload | None = None,
    local: LocalPrefill | None = None,
) -> tuple[list[int], float, Report]:
    """The product's pipeline over the pools: the answer's tokens, seconds, and report.

    With `on_overload` the speculator is full, and `selection` is not asked for. `local` decides
    which prompts decode computes.
    """
    planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=1)
    speculator, fallback = FixedSpeculator(selection), Fallback()
    if on_overload is not None:
        speculator, fallback = FullSpeculator(), Fallback(on_overload, SHIPPED)
    pipeline = Pipeline(
        speculator, pools, pools, fallback=fallback, overlap=pools.overlap, local=local
    )
    started_s = time.monotonic()
    async with asyncio.timeout(90):
        chunks = [chunk async for chunk in pipeline.generate(planner.with_plan(request))]
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    report = chunks[-1].report
    assert report is not None
    return tokens, time.monotonic() - started_s, report
