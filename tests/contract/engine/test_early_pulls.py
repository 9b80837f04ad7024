"""Pulls that begin while their prompt is computed, from one peer or from several at once."""

from __future__ import annotations

import asyncio

import pytest
import torch

from specprefill.core.types import Lease, Span, Ticket
from specprefill.engine.handoff.caches import Caches
from specprefill.engine.handoff.device import HostDevice
from specprefill.engine.handoff.groups import KvGroups
from specprefill.engine.handoff.holder import Holder
from specprefill.engine.handoff.layout import RowLayout
from specprefill.engine.handoff.orders import Orders, Pull, Stage
from specprefill.engine.handoff.puller import Puller, WorkerPlace
from specprefill.kv.frames import decode
from specprefill.kv.object_ref.stream import messages
from specprefill.kv.rpc import KvPeers
from specprefill.kv.shards import Split
from specprefill.prefill import object_writer
from tests.contract.engine.worker_pair import (
    CHUNKS,
    DECODE_BLOCKS,
    DIM,
    HEADS,
    LAYERS,
    NAMES,
    PAGE,
    PAGES,
    PREFILL_BLOCKS,
    TOKENS,
    config,
    kv_of,
    wait_for,
)


async def announced(address):
    """Return the first announcement of a worker."""
    peers = KvPeers()
    try:
        async with asyncio.timeout(20.0):
            return await anext(peers.announcements(address))
    finally:
        await peers.close()


class OwnDevice(HostDevice):
    """Like a GPU, a device that an engine that polls takes nothing from."""

    shares_cores = False


async def test_a_pull_may_start_with_the_first_chunk(pair):
    both = pair(OwnDevice(), HostDevice())
    heard = asyncio.create_task(announced(both.holder.endpoint.address))
    while not heard.done():  # an announcement is for those who listen by then
        both.prefill(CHUNKS[:1])
        await asyncio.wait([heard], timeout=0.05)
    assert heard.result().tokens == TOKENS


@pytest.mark.parametrize("readers", [1, 0])
async def test_on_shared_cores_it_starts_with_the_last_chunk(pair, readers):
    """The service listens to the last worker; if it has copies of heads, nobody pulls from it."""
    both = pair(HostDevice(), HostDevice(), readers=readers)
    heard = asyncio.create_task(announced(both.holder.endpoint.address))
    both.prefill(CHUNKS[:1])
    await asyncio.wait([heard], timeout=0.5)
    assert not heard.done()
    while not heard.done():
        both.prefill(CHUNKS[1:])
        await asyncio.wait([heard], timeout=0.05)
    assert heard.result().tokens == TOKENS


async def test_a_worker_that_nobody_pulls_from_does_not_delay_the_others_objects(pair, monkeypatch):
    """Objects are one per rank: its own has no frame, and is there when theirs are."""
    monkeypatch.setattr(object_writer.ray, "put", lambda kv: [array.copy() for array in kv])
    ranks = [
        pair(HostDevice(), HostDevice(), carrier="object_ref", readers=readers)
        for readers in (1, 0)
    ]
    peers = tuple(rank.holder.endpoint.address for rank in ranks)
    ticket = Ticket(Lease("lease", "secret"), peers, "layout", TOKENS)
    writer = object_writer.KvObjects(None)
    for rank in ranks:
        rank.prefill(CHUNKS[:1])
    storing = asyncio.create_task(writer.store(ticket, 10.0))
    await asyncio.wait([storing], timeout=0.3)
    assert not storing.done()
    for rank in ranks:
        rank.prefill(CHUNKS[1:])
    ends = [decode(list(messages(kv))[-1], "lease") for kv in await storing]
    assert [end.frames > 0 for end in ends] == [True, False]
    writer.close()


def test_a_pull_that_starts_with_the_first_chunk_ends_with_the_last(pair):
    both = pair(HostDevice(), HostDevice())
    both.prefill(CHUNKS[:1])
    both.start_pull()
    both.prefill(CHUNKS[1:])
    assert both.pull_failed() is False
    assert both.arrived()


class Half:
    """A prefill worker with half of the heads."""

    def __init__(self, rank):
        device, heads = HostDevice(), HEADS // 2
        self.heads = slice(rank * heads, (rank + 1) * heads)
        self.tensors = {name: torch.zeros((PAGES, heads, PAGE, 2 * DIM)) for name in NAMES}
        groups = KvGroups(PAGE, (False,), dict.fromkeys(NAMES, 0))
        layout = RowLayout(self.tensors[NAMES[0]])
        caches = Caches(self.tensors, layout, device, groups, "layout")
        self.holder = Holder(config(), caches, device, readers=1)

    def prefill(self, start, stop):
        blocks = torch.tensor(PREFILL_BLOCKS)
        stage = Stage(Lease("lease", "secret"), start, stop, TOKENS, [PREFILL_BLOCKS])
        orders = Orders(stages=[stage])
        for layer, name in enumerate(NAMES):
            kv = kv_of(layer)[start:stop, :, self.heads]
            RowLayout(self.tensors[name]).write(self.tensors[name], blocks, start, kv)
            self.holder.stage(name, orders)
        self.holder.finish_step(orders)

    def pulled(self):
        """Return the pulls from this worker that are over."""

        async def ask():
            peers = KvPeers()
            found = await peers.gauges(self.holder.endpoint.address)
            await peers.close()
            return found.pulled_total

        return asyncio.run(ask())


def test_peers_are_pulled_from_at_once(pair):
    """One of two workers has its last chunk long before the other has."""
    stages = (Span(0, LAYERS),)
    both, halves = pair(HostDevice(), HostDevice()), [Half(0), Half(1)]
    place = WorkerPlace(0, Split(HEADS, 1, stages), Split(HEADS, 2, stages))
    both.puller.stop()
    both.puller = Puller(config(), both.pulled, HostDevice(), place, nixl=None, tls=None)
    peers = tuple(half.holder.endpoint.address for half in halves)
    for half in halves:
        half.prefill(*CHUNKS[0])
    ticket = Ticket(Lease("lease", "secret"), peers, "layout", TOKENS)
    both.puller.start_pulls(Orders(pulls=[Pull("request", ticket, 0, TOKENS, [DECODE_BLOCKS])]))
    halves[1].prefill(*CHUNKS[1])
    assert wait_for(lambda: halves[1].pulled() or None) == 1
    assert halves[0].pulled() == 0
    halves[0].prefill(*CHUNKS[1])
    assert both.pull_failed() is False
    assert both.arrived()
    for half in halves:
        half.holder.stop()
