"""The prefill side of a worker: copies KV out under leases and serves it on its KV port."""

from __future__ import annotations

import logging
import threading
import time

import torch
from vllm.utils.network_utils import get_ip

from ...kv.announcements import Announcement, Announcements
from ...kv.arena import Arena
from ...kv.frames import FRAME_BYTES, Frame, pieces, seal
from ...kv.leases import LeaseStore
from ...kv.nixl import NixlAgent
from ...kv.nixl_rpc import NixlHandler
from ...kv.rpc import KvServer
from ...kv.shared import LocateHandler, SharedMemory
from ...kv.tls import MutualTls
from .caches import Caches
from .device import Device
from .orders import Endpoint, HandoffConfig, Orders, Stage
from .ring import ring_of
from .staging import StagedPiece, Stager

logger = logging.getLogger("vllm.specprefill.handoff")

_SLOT_BYTES = 4 << 20  # large enough for the bus, small enough to overlap
_SWEEP_S = 0.5


class Holder:
    """Complete when it is made: it listens, and stages what its orders say."""

    def __init__(
        self,
        config: HandoffConfig,
        caches: Caches,
        device: Device,
        *,
        readers: int,
        nixl: NixlAgent | None,
        tls: MutualTls | None,
    ) -> None:
        self._caches = caches
        self._readers = readers
        slot_bytes = max(caches.token_bytes, min(_SLOT_BYTES, config.staging_bytes // 2))
        ring = ring_of(device, config.staging_bytes, slot_bytes)
        self._leases = LeaseStore(
            max_bytes=max(0, config.max_held_bytes - ring.size),
            lease_s=config.lease_s,
            now=time.monotonic,
        )
        self._announcements = Announcements()
        self._stager = Stager(device, ring, caches.layout, self._append, self._fail)
        self._arena: Arena | None = None
        self._stopping = threading.Event()
        self._server = KvServer(
            self._leases,
            self._announcements,
            caches.fingerprint,
            get_ip() if config.host is None else config.host,
            tls=tls,
            more_handlers=self._memory_handlers(config, nixl),
        )
        self._endpoint = Endpoint(self._server.start(), caches.fingerprint)
        threading.Thread(target=self._sweep, name="kv-sweep", daemon=True).start()

    @property
    def endpoint(self) -> Endpoint:
        """The address of this worker's KV port, and the layout of what it serves."""
        return self._endpoint

    def stage(self, layer_name: str, cache: torch.Tensor, orders: Orders) -> None:
        """Copy one layer's new tokens of every staged request."""
        if self._readers == 0:
            return
        layer = self._caches.layers[layer_name]
        for order in orders.stages:
            self._leases.open(order.lease_id, order.secret)
            blocks = self._caches.block_tensor(order.lease_id, order.blocks)
            self._stager.stage(order, layer, cache, blocks)
            if order.stop == order.tokens and layer == self._announced_layer(order):
                self._announcements.tell(
                    Announcement(order.lease_id, order.tokens, self._caches.fingerprint)
                )

    def finish_step(self, orders: Orders) -> None:
        """After the last layer: drop what was aborted, let handed-out leases age.

        Nothing is waited for: every gather runs before later writes, on their stream.
        """
        for order in orders.stages:
            self._caches.forget(order.lease_id)
        for lease_id, secret in orders.drops:
            self._leases.release(lease_id, secret)
        for lease_id in orders.issued:
            self._leases.issue(lease_id)

    def stop(self) -> None:
        """Stop serving."""
        self._stopping.set()
        self._server.stop()
        self._stager.close()

    def _memory_handlers(
        self, config: HandoffConfig, nixl: NixlAgent | None
    ) -> list[NixlHandler | LocateHandler]:
        """Lay leases where others can read them: peers with NIXL, or this node's processes."""
        if nixl is not None:
            self._arena = Arena(config.max_held_bytes)
            nixl.register(self._arena)
            return [NixlHandler(self._leases, self._caches.fingerprint, nixl, self._arena)]
        if config.carrier == "object_ref":
            shared = SharedMemory(config.max_held_bytes)
            locate = LocateHandler(self._leases, self._caches.fingerprint, shared)
            self._arena = locate.arena
            return [locate]
        return []

    def _announced_layer(self, order: Stage) -> int:
        """Where in the last chunk the decode side may begin to pull.

        It polls while it waits. So it waits for half a chunk only, unless the KV of chunks
        before the last one is there to be moved meanwhile.
        """
        layers: list[int] = sorted(self._caches.by_layer)
        return layers[0 if order.start > 0 else len(layers) // 2]

    def _append(self, piece: StagedPiece) -> None:
        """Hold a piece; the last one of the prompt completes its lease."""
        order = piece.order
        ends = piece.ends_chunk and order.stop == order.tokens
        whole = ends and piece.layer == max(self._caches.by_layer)
        frame = Frame(piece.layer, piece.start, piece.stop, piece.payload)
        for part in pieces(frame, FRAME_BYTES):
            sealed = seal(part, order.lease_id, self._arena)
            self._leases.append(order.lease_id, sealed, last=whole and part.stop == piece.stop)

    def _fail(self, order: Stage) -> None:
        """A lease that can not become complete ends at once: its reader need not wait."""
        self._leases.release(order.lease_id, order.secret)

    def _sweep(self) -> None:
        """Nothing steps an idle engine, so expiry has a thread of its own."""
        while not self._stopping.wait(_SWEEP_S):
            expired = self._leases.sweep()
            if expired:
                logger.warning("leases expired unpulled: count=%d", expired)
