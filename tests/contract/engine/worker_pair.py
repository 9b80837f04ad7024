"""A prefill worker and a decode worker that hand one prompt over, without engines."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from specprefill.core.types import Lease, Span, Ticket
from specprefill.engine.handoff.caches import Caches
from specprefill.engine.handoff.groups import KvGroups
from specprefill.engine.handoff.holder import Holder
from specprefill.engine.handoff.layout import RowLayout
from specprefill.engine.handoff.orders import HandoffConfig, Orders, Pull, Stage
from specprefill.engine.handoff.puller import Puller, WorkerPlace
from specprefill.kv.shards import Split

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

    def __init__(self, holder_device, puller_device, *, readers=1, **changes):
        held, self.prefill_tensors = empty_caches(holder_device)
        self.holder = Holder(config(**changes), held, holder_device, readers=readers)
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
