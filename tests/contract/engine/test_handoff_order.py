"""The hand-over between two workers, on devices whose copies are as late as they may be."""

from __future__ import annotations

import logging
import os
import signal
import time

import psutil
import pytest
import torch

from specprefill.core.errors import KvTransferError, LayoutMismatch, UnsupportedModel
from specprefill.core.types import Lease, Ticket
from specprefill.engine.handoff import device_memory
from specprefill.engine.handoff.caches import Caches, kernel_blocks
from specprefill.engine.handoff.device import HostDevice
from specprefill.engine.handoff.groups import KvGroups
from specprefill.engine.handoff.layout import RowLayout
from specprefill.engine.handoff.orders import Orders, Stage
from specprefill.engine.handoff.ring import BufferRing
from specprefill.engine.handoff.staging import Stager
from specprefill.kv.frames import FRAME_BYTES
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.pull import KvClient
from tests.contract.engine.strict_device import POISON, BrokenDevice, StrictDevice, UnorderedDevice
from tests.contract.engine.worker_pair import (
    DIM,
    HEADS,
    NAMES,
    PAGE,
    PAGES,
    TOKENS,
    wait_for,
)


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


@pytest.mark.parametrize("device", [HostDevice, StrictDevice])
def test_kv_in_device_memory_is_read_from_there(pair, device):
    """On CPUs the device's memory is the host's: the same descriptors, reads and order."""
    both = pair(device(), device(), carrier="nixl", memory="device")
    both.prefill()
    assert both.pull() is False
    assert both.arrived()


@pytest.mark.parametrize("device", [HostDevice, StrictDevice])
def test_a_landing_place_is_not_used_again_before_the_device_has_read_it(pair, monkeypatch, device):
    """All frames land in the same place: a pull waits until the device has read the one before."""
    monkeypatch.setattr(device_memory, "LANDING_BYTES", 12 << 10)
    both = pair(device(), device(), carrier="nixl", memory="device")
    both.prefill()
    assert both.pull() is False
    assert both.arrived()


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


class ScatteredKeeper(RecordingKeeper):
    """Its memory is free in places of `free_bytes` only."""

    def __init__(self, free_bytes, places):
        super().__init__()
        self.arena = Arena(2 * places * free_bytes)
        taken = [self.arena.take(free_bytes) for _ in range(2 * places)]
        self.between = taken[::2]  # no two free places are adjacent
        self.asked, self.views = [], []

    def take(self, size):
        view = self.arena.take(size)
        if view is None:
            return None
        self.views.append(view)
        return self.arena.offset_of(view), view

    def ask(self, *request):
        self.asked.append(request)


@pytest.mark.parametrize(("frames", "staged"), [(16, True), (7.5, True), (1.5, True), (0.9, False)])
def test_kv_is_staged_into_whatever_places_hold_a_frame(frames, staged):
    """Leases of several sizes leave places between them that hold less than the largest piece."""
    tokens, device = 30_000, HostDevice()
    pages = tokens // PAGE
    cache = torch.randn(pages, HEADS, PAGE, 2 * 64).to(torch.bfloat16)
    groups = KvGroups(PAGE, (False,), {NAMES[0]: 0})
    known = Caches({NAMES[0]: cache}, RowLayout(cache), device, groups, "layout")
    keeper = ScatteredKeeper(int(frames * FRAME_BYTES) // 64 * 64, 64)
    stager = Stager(device, known, keeper, 64 << 20, torch.from_numpy(keeper.arena.memory))
    order = Stage(Lease("lease", "secret"), 0, tokens, tokens, [list(range(pages))])
    stager.stage(order, 0, last_layer=True)
    if not staged:
        assert keeper.asked == [("drop", "lease")]
        return
    assert keeper.asked == []
    assert [piece.last for piece in keeper.pieces] == [False] * (len(keeper.pieces) - 1) + [True]
    kept = [
        frame
        for piece, view in zip(keeper.pieces, keeper.views, strict=True)
        for frame, _ in piece.frames(view)
    ]
    assert [frame.start for frame in kept] == [0, *(frame.stop for frame in kept[:-1])]
    kv = known.layout.read(cache, torch.arange(pages), 0, tokens)
    assert b"".join(bytes(frame.payload) for frame in kept) == bytes(kv.view(torch.uint8).numpy())


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
