"""The hand-over between two workers, on devices whose copies are as late as they may be."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time

import psutil
import pytest
import torch

from specprefill.core.errors import KvTransferError, LayoutMismatch, UnsupportedModel
from specprefill.core.types import Lease, Span, Ticket
from specprefill.engine.handoff.caches import Caches, kernel_blocks
from specprefill.engine.handoff.device import HostDevice
from specprefill.engine.handoff.groups import KvGroups
from specprefill.engine.handoff.holder import Holder
from specprefill.engine.handoff.layout import RowLayout
from specprefill.engine.handoff.orders import HandoffConfig, Orders, Pull, Stage
from specprefill.engine.handoff.puller import Puller, WorkerPlace
from specprefill.engine.handoff.ring import BufferRing
from specprefill.engine.handoff.staging import Stager
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvPeers
from specprefill.kv.shards import Split
from tests.contract.engine.strict_device import POISON, BrokenDevice, StrictDevice, UnorderedDevice

LAYERS, HEADS, DIM, PAGE, PAGES = 3, 2, 8, 16, 16
TOKENS = 150
CHUNKS = ((0, 64), (64, TOKENS))
NAMES = [f"model.layers.{layer}.attn" for layer in range(LAYERS)]
PREFILL_BLOCKS = [5, 1, 3, 0, 7, 2, 6, 4, 9, 8]
DECODE_BLOCKS = [2, 11, 4, 6, 9, 1, 14, 3, 8, 0]
PLACE = WorkerPlace(0, *[Split(HEADS, 1, (Span(0, LAYERS),))] * 2)


def config(**changes):
    values = {
        "carrier": "grpc",
        "memory": "host",
        "host": "127.0.0.1",
        "lease_s": 30.0,
        "max_held_bytes": 64 << 20,
        "staging_bytes": 8 << 10,  # two buffers of four KiB: every layer needs several turns
        "pull_timeout_s": 10.0,
        "tls": None,
        "streams": 1,
        "stages_layers": True,
        "peer_tensor_parallel_size": 1,
        "peer_pipeline_parallel_size": 1,
        "adapters": [],
    }
    return HandoffConfig(**values | changes)


def empty_caches(device, value=0.0):
    tensors = {name: torch.full((PAGES, HEADS, PAGE, 2 * DIM), value) for name in NAMES}
    groups = KvGroups(PAGE, (False,), dict.fromkeys(NAMES, 0))
    return Caches(tensors, RowLayout(tensors[NAMES[0]]), device, groups, "layout"), tensors


def kv_of(layer):
    torch.manual_seed(layer)
    return torch.randn(TOKENS, 2, HEADS, DIM)


def wait_for(found, timeout_s=20.0):
    """Return what `found` returns once it is not None."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if (value := found()) is not None:
            return value
        threading.Event().wait(0.01)
    return pytest.fail("it did not happen in time")


class Pair:
    """A prefill worker that has staged one prompt, and a decode worker."""

    def __init__(self, holder_device, puller_device, **changes):
        held, self.prefill_tensors = empty_caches(holder_device)
        self.holder = Holder(config(**changes), held, holder_device, readers=1)
        self.pulled, self.decode_tensors = empty_caches(puller_device, 7.0)
        self.puller = Puller(
            config(**changes), self.pulled, puller_device, PLACE, nixl=None, tls=None
        )

    def prefill(self, chunks=CHUNKS):
        """Compute the prompt in chunks; each step's pages are overwritten once it has returned."""
        layout, blocks = RowLayout(self.prefill_tensors[NAMES[0]]), torch.tensor(PREFILL_BLOCKS)
        for start, stop in chunks:
            orders = Orders(
                stages=[Stage(Lease("lease", "secret"), start, stop, TOKENS, [PREFILL_BLOCKS])]
            )
            for layer, name in enumerate(NAMES):
                cache = self.prefill_tensors[name]
                layout.write(cache, blocks, start, kv_of(layer)[start:stop])
                self.holder.stage(name, orders)
                cache.fill_(-1.0)
            self.holder.finish_step(orders)

    def pull(self):
        """Pull the prompt; return whether it failed."""
        self.start_pull()
        return self.pull_failed()

    def start_pull(self):
        peers = (self.holder.endpoint.address,)
        ticket = Ticket(Lease("lease", "secret"), peers, "layout", TOKENS)
        order = Pull("request", ticket, 0, TOKENS, [DECODE_BLOCKS])
        self.puller.start_pulls(Orders(pulls=[order]))

    def pull_failed(self):
        """Wait for the end of the pull; return whether it failed."""

        def reported():
            results = self.puller.take_results(set())
            return results if results.finished_recving else None

        return "request" in (wait_for(reported).failed_recving or set())

    def arrived(self):
        """Return True if the decode worker's pages hold the prompt's KV."""
        blocks = torch.tensor(DECODE_BLOCKS)
        layout = RowLayout(self.decode_tensors[NAMES[0]])
        return all(
            torch.equal(layout.read(self.decode_tensors[name], blocks, 0, TOKENS), kv_of(layer))
            for layer, name in enumerate(NAMES)
        )

    def stop(self):
        self.puller.stop()
        self.holder.stop()


@pytest.fixture
def pair():
    made = []

    def make(holder_device, puller_device, **changes):
        made.append(Pair(holder_device, puller_device, **changes))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.fixture
def logged():
    """The messages of the hand-over's own logger, whatever vLLM does with its loggers."""
    messages = []

    class Handler(logging.Handler):
        def emit(self, record):
            messages.append(record.getMessage())

    logger, handler = logging.getLogger("vllm.specprefill.handoff"), Handler()
    level = logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.mark.parametrize("streams", [1, 3])
@pytest.mark.parametrize("device", [HostDevice, StrictDevice])
def test_what_is_reported_pulled_is_in_the_cache(pair, device, streams):
    both = pair(device(), device(), streams=streams)
    both.prefill()
    assert both.pull() is False
    assert both.arrived()


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


async def test_on_shared_cores_it_starts_with_the_last_chunk(pair):
    both = pair(HostDevice(), HostDevice())
    heard = asyncio.create_task(announced(both.holder.endpoint.address))
    both.prefill(CHUNKS[:1])
    await asyncio.wait([heard], timeout=0.5)
    assert not heard.done()
    while not heard.done():
        both.prefill(CHUNKS[1:])
        await asyncio.wait([heard], timeout=0.05)
    assert heard.result().tokens == TOKENS


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


@pytest.mark.parametrize("device", [HostDevice, StrictDevice])
def test_kv_in_device_memory_is_read_from_there(pair, device):
    """On CPUs the device's memory is the host's: the same descriptors, reads and order."""
    both = pair(device(), device(), carrier="nixl", memory="device")
    both.prefill()
    assert both.pull() is False
    assert both.arrived()


def test_a_landing_place_is_not_used_again_before_the_device_has_read_it(pair):
    """Without the wait for its event, a later frame would land on an earlier one."""
    both = pair(HostDevice(), UnorderedDevice(), carrier="nixl", memory="device")
    both.prefill()
    both.pull()
    assert not both.arrived()


def test_kv_in_device_memory_is_not_sent_as_bytes(pair):
    """The keeper maps only the shadow of the KV."""
    both = pair(HostDevice(), HostDevice(), carrier="nixl", memory="device")
    both.prefill()
    client = KvClient()
    ticket = Ticket(Lease("lease", "secret"), (), "layout", TOKENS)
    pull = client.pull(both.holder.endpoint.address, ticket, "layout", 0, 5.0)
    with pytest.raises(LayoutMismatch, match="device memory"):
        pull.deliver_to(lambda _frame: None)
    client.close()


def test_a_pull_that_is_reported_before_its_writes_are_done_would_be_seen(pair):
    """The order that is tested above, left out: this device's waits do nothing."""
    both = pair(StrictDevice(), UnorderedDevice())
    both.prefill()
    both.pull()
    assert not both.arrived()


def test_a_block_is_written_only_after_its_last_owner(pair):
    """The last owner's step was launched, but its writes have not run when the pull begins."""
    device = StrictDevice()
    both = pair(StrictDevice(), device)
    both.prefill()
    late = both.decode_tensors[NAMES[1]]
    device.launch(lambda: late.fill_(3.0))
    both.pull()
    device.compute.wait()
    assert both.arrived()


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, ValueError, IndexError])
def test_no_exception_in_a_pull_counts_as_arrived(pair, monkeypatch, logged, error):
    both = pair(HostDevice(), HostDevice())
    both.prefill()

    def broken(*_args):
        raise error("unforeseen")

    monkeypatch.setattr(both.pulled.layout, "write", broken)
    assert both.pull() is True
    assert logged == ["pull failed: request=request"]


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, ValueError])
def test_a_copy_that_fails_ends_its_lease_at_once(pair, logged, error):
    """The decode side does not wait `pull_timeout_s` for KV that cannot come."""
    both = pair(BrokenDevice(error), HostDevice(), pull_timeout_s=30.0, staging_bytes=8 << 20)
    both.prefill()
    started_s = time.monotonic()
    assert both.pull() is True
    assert time.monotonic() - started_s < 10
    assert "kv staging failed: lease=lease" in logged


def test_a_prompt_beyond_the_memory_is_recomputed_and_the_memory_comes_back(pair):
    both = pair(HostDevice(), HostDevice(), max_held_bytes=32 << 10, staging_bytes=8 << 10)
    both.prefill()
    assert both.pull() is True
    first, view = wait_for(lambda: both.holder._keeper.take(30 << 10))
    assert first == 0
    assert len(view) == 30 << 10


def test_a_keeper_ends_with_its_worker_and_is_nobodys_child(pair):
    both = pair(HostDevice(), HostDevice())
    keeper = psutil.Process(both.holder._keeper.pid)
    assert keeper not in psutil.Process().children(recursive=True)
    both.holder.stop()
    keeper.wait(10)


def test_a_dead_keeper_ends_the_engine(pair):
    """Else it would go on handing out tickets that nobody can pull."""
    both = pair(HostDevice(), HostDevice())
    os.kill(both.holder._keeper.pid, signal.SIGKILL)

    def is_known():
        try:
            both.holder.finish_step(Orders())
        except KvTransferError:
            return True
        return None

    assert wait_for(is_known)


class RecordingKeeper:
    """Room for everything; a copy is waited for only at the end."""

    def __init__(self):
        self.pieces, self.waits, self.taken = [], [], 0

    def take(self, size):
        self.taken += size
        return self.taken - size, memoryview(b"")

    def append(self, piece, copied):
        self.pieces.append(piece)
        self.waits.append(copied)


def test_staging_is_bounded_by_configuration():
    """100,000 cached tokens in one step: a GPU's memory for them is outside vLLM's budget."""
    tokens, most_bytes = 100_000, 64 << 20
    device, keeper = StrictDevice(), RecordingKeeper()
    pages = tokens // PAGE
    cache = torch.zeros(pages, HEADS, PAGE, 2 * 64, dtype=torch.bfloat16)
    caches = {f"model.layers.{layer}.attn": cache for layer in range(4)}
    groups = KvGroups(PAGE, (False,), dict.fromkeys(caches, 0))
    known = Caches(caches, RowLayout(cache), device, groups, "layout")
    memory = torch.empty(1 << 28, dtype=torch.uint8)
    stager = Stager(device, known, keeper, most_bytes, memory)
    order = Stage(Lease("lease", "secret"), 0, tokens, tokens, [list(range(pages))])
    for layer in range(4):
        stager.stage(order, layer, last_layer=layer == 3)
    assert sum(piece.size for piece in keeper.pieces) > 3 * most_bytes
    assert 0 < device.peak <= most_bytes


def test_a_ring_waits_for_its_oldest_copy_before_a_buffer_is_used_again():
    device = StrictDevice()
    ring, stream = BufferRing(device, 8, 2), device.stream()
    read = []
    for turn in range(6):
        buffer = ring.take()
        buffer.fill_(turn)
        copied = stream.write(buffer, lambda there: read.append(int(there[0])))
        ring.give_after(copied, buffer)
    stream.wait()
    assert read == [0, 1, 2, 3, 4, 5]
    assert POISON not in read


@pytest.mark.parametrize(("block", "page", "ratio"), [(16, 16, 1), (128, 16, 8), (64, 32, 2)])
def test_blocks_are_whole_numbers_of_kernel_pages(block, page, ratio):
    assert kernel_blocks(block, page) == ratio


@pytest.mark.parametrize(("block", "page"), [(16, 32), (48, 32)])
def test_pages_that_do_not_divide_a_block_are_refused(block, page):
    with pytest.raises(UnsupportedModel, match=f"block_size \\({block}\\)"):
        kernel_blocks(block, page)


def test_a_block_of_several_pages_is_read_page_by_page():
    device = HostDevice()
    tensors = {NAMES[0]: torch.randn(PAGES, HEADS, PAGE, 2 * DIM)}
    groups = KvGroups(2 * PAGE, (False,), dict.fromkeys(NAMES[:1], 0))
    known = Caches(tensors, RowLayout(tensors[NAMES[0]]), device, groups, "layout")
    pages = known.block_tensor("order", 0, [[3, 0]])
    assert pages.tolist() == [6, 7, 0, 1]
    kv = known.layout.read(tensors[NAMES[0]], pages, 2 * PAGE, 2 * PAGE + 1)
    assert torch.equal(kv[0, 0], tensors[NAMES[0]][0, :, 0, :DIM])
