"""Early tickets of a prefill service whose worker's port is under mutual TLS."""

from __future__ import annotations

import asyncio
import time
from contextlib import aclosing

import msgspec
import pytest
from vllm import SamplingParams

from specprefill.core.types import Carrier, Plan, PlanKind, Reason, Request, Selection, Span, Ticket
from specprefill.engine.params import KV_TRANSFER, lease_in
from specprefill.kv.announcements import Announcement, Announcements
from specprefill.kv.leases import LeaseStore
from specprefill.kv.rpc import KvPeers, KvServer
from specprefill.kv.tls import RELOAD_S, watch_tls
from specprefill.prefill.service import PrefillService
from tests.certificates import Authority

TOKENS = 16
ENDLESS = Request("r1", (0,) * TOKENS, msgspec.msgpack.encode(SamplingParams(max_tokens=8)))
DENSE = Selection(TOKENS, (Span(0, TOKENS),), Plan(PlanKind.DENSE, Reason.ASKED, 1.0))


class EndlessEngine:
    """An engine of one worker, whose prefills never end: a ticket comes early, or not at all."""

    def __init__(self, kv_address: str, announcements: Announcements) -> None:
        self._kv_address = kv_address
        self._announcements = announcements

    def start(self) -> None:
        pass

    async def load_adapters(self) -> None:
        pass

    def close(self) -> None:
        pass

    async def kv_addresses(self) -> list[str]:
        return [self._kv_address]

    async def kv_carrier(self) -> Carrier:
        return Carrier.GRPC

    def kv_bytes_per_token(self) -> int:
        return 1

    def max_model_len(self) -> int:
        return TOKENS

    async def generate(self, _prompt, params, *_others):
        lease = lease_in(params.extra_args[KV_TRANSFER])
        while True:
            self._announcements.announce(Announcement(lease.id, TOKENS, "layout"))
            await asyncio.sleep(0.05)
        yield


class Port:
    """The KV port of a worker, whose certificates are renewed."""

    def __init__(self, folder) -> None:
        self._folder = folder
        self.files = Authority(folder).files()
        self.announcements = Announcements()
        leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
        tls = watch_tls(self.files)
        self._server = KvServer(leases, self.announcements, "layout", "127.0.0.1", tls=tls)
        self.address = self._server.start()

    def stop(self) -> None:
        self._server.stop()

    async def renew(self, look) -> None:
        """Let another authority sign from now on, and let `look` call with its certificate."""
        Authority(self._folder).files()
        await asyncio.sleep(RELOAD_S)  # files are looked at by the clock
        for _ in range(100):  # each side has its own clock
            if await look():
                return
            await asyncio.sleep(0.1)
        pytest.fail("nobody answers with the new certificates")


@pytest.fixture
def port(tmp_path):
    port = Port(tmp_path / "pki")
    yield port
    port.stop()


async def early_ticket(service) -> Ticket:
    async with asyncio.timeout(30.0), aclosing(service.steps(ENDLESS, DENSE, 60.0)) as steps:
        return await anext(steps)


async def test_tickets_come_early_after_every_renewal_of_the_certificates(port):
    """At the second one, the channel is closed on which announcements are waited for."""
    engine = EndlessEngine(port.address, port.announcements)
    async with PrefillService(engine, watch_tls(port.files)) as service:
        assert isinstance(await early_ticket(service), Ticket)
        for _ in range(3):
            await port.renew(service.gauges)
            ticket = await early_ticket(service)
            assert (ticket.endpoints, ticket.tokens) == ((port.address,), TOKENS)


async def test_a_watch_ends_when_its_task_is_cancelled(port):
    peers = KvPeers(watch_tls(port.files))

    async def watch():
        return [announced async for announced in peers.announcements(port.address)]

    watching = asyncio.create_task(watch())
    await asyncio.wait([watching], timeout=0.5)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    await peers.close()
