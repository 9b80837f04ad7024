"""The connector's half in a worker: copies KV out under leases, pulls KV in."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults
from vllm.model_executor.models.utils import extract_layer_index
from vllm.utils.network_utils import get_ip

from ..errors import CorruptFrame, KvTransferError, LayoutMismatch
from ..kv.announcements import Announcement, Announcements
from ..kv.arena import Arena
from ..kv.carriers import KvPuller, KvPulling
from ..kv.frames import FRAME_BYTES, Frame, from_token, pieces, seal
from ..kv.leases import LeaseStore
from ..kv.nixl import agent_for
from ..kv.nixl_rpc import LANDING_BYTES, NixlClient, NixlHandler
from ..kv.pull import KvClient
from ..kv.rpc import KvServer
from ..kv.shards import Source, readers, sources
from ..kv.shared import LocateHandler, SharedMemory
from ..kv.tls import read_tls
from ..types import Carrier, Span
from .handoff import Endpoint, HandoffConfig, Orders, Pull, PullTimes, Stage
from .layout import KvLayout, fingerprint, layout_of
from .split import own_split, peer_split, worker_rank
from .staging import Stager, stager_for

logger = logging.getLogger("vllm.specprefill.handoff")

_PULL_THREADS = 8
_SWEEP_S = 0.5


class WorkerHalf:
    """Runs in each worker process; pulls and the server have threads of their own."""

    def __init__(self, vllm_config: VllmConfig, config: HandoffConfig, *, producer: bool) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._producer = producer
        self._tls = read_tls(config.tls)
        self._split = own_split(vllm_config)
        self._peer_split = peer_split(vllm_config, config)
        self._rank = worker_rank(self._split)
        self._readers = readers(self._rank, self._split, self._peer_split)
        self._leases = LeaseStore(
            max_bytes=config.max_held_bytes, lease_s=config.lease_s, now=time.monotonic
        )
        self._announcements = Announcements()
        self._lock = threading.Lock()
        self._results = KVConnectorTransferResults()
        self._running: dict[str, KvPulling] = {}
        self._exposed_s: dict[str, float] = {}
        self._block_tensors: dict[str, torch.Tensor] = {}  # of orders under way
        self._stopping = threading.Event()

    def start(self, caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout, and listen if this engine hands KV over."""
        self._layers: dict[str, int] = {name: extract_layer_index(name) for name in caches}
        self._caches = {self._layers[name]: cache for name, cache in caches.items()}
        any_cache = next(iter(caches.values()))
        self._device = any_cache.device
        self._layout: KvLayout = layout_of(any_cache)
        holder = self._split if self._producer else self._peer_split
        self._fingerprint = fingerprint(self._vllm_config, holder, any_cache)
        with _any_core():  # threads inherit the affinity of the one that makes them
            self._nixl = agent_for(self._config.carrier, encrypted=self._tls is not None)
            self._pool = ThreadPoolExecutor(_PULL_THREADS, thread_name_prefix="kv-pull")
            if self._producer:
                self._listen()
            else:
                self._connect()
        logger.info("kv carrier: %s", self.carrier)

    def endpoint(self) -> Endpoint | None:
        """Where this worker's leases can be pulled; None on the decode side."""
        return Endpoint(self._address, self._fingerprint) if self._producer else None

    @property
    def address(self) -> str | None:
        """`host:port` of this worker's KV port; None on the decode side."""
        return self._address if self._producer else None

    @property
    def carrier(self) -> Carrier:
        """The best carrier that this worker has."""
        return Carrier.GRPC if self._nixl is None else Carrier.NIXL

    def begin(self, orders: Orders) -> None:
        """Start this step's pulls."""
        for pull in orders.pulls:
            self._pool.submit(self._pull, pull)

    def stage(self, layer_name: str, cache: torch.Tensor, orders: Orders) -> None:
        """Copy one layer's new tokens of every staged request."""
        if self._readers == 0:
            return
        layer = self._layers[layer_name]
        for order in orders.stages:
            kv = self._layout.read(
                cache, self._block_tensor(order.lease_id, order.blocks), order.start, order.stop
            )
            self._stager.take(order, layer, kv)
            if order.stop == order.tokens and layer == self._announced_layer(order):
                self._announcements.tell(
                    Announcement(order.lease_id, order.tokens, self._fingerprint)
                )

    def _announced_layer(self, order: Stage) -> int:
        """Where in the last chunk the decode side may begin to pull.

        It polls while it waits. So it waits for half a chunk only, unless the KV of chunks
        before the last one is there to be moved meanwhile.
        """
        layers: list[int] = sorted(self._caches)
        return layers[0 if order.start > 0 else len(layers) // 2]

    def finish_step(self, orders: Orders) -> None:
        """After the last layer: every copy is with its lease; drop what was aborted."""
        if not self._producer:
            return
        self._stager.flush()
        for order in orders.stages:
            self._block_tensors.pop(order.lease_id, None)
        for lease_id, secret in orders.drops:
            self._leases.release(lease_id, secret)

    def results(self, aborted: set[str]) -> KVConnectorTransferResults:
        """Take what has ended. An aborted request's pull is cancelled, then reported."""
        with self._lock:
            for request_id in aborted & self._running.keys():
                self._running[request_id].cancel()
            results, self._results = self._results, KVConnectorTransferResults()
            return results

    def pull_times(self) -> PullTimes | None:
        """Take the times of the pulls that have ended."""
        with self._lock:
            times, self._exposed_s = self._exposed_s, {}
            return PullTimes(times) if times else None

    def stop(self) -> None:
        """Stop serving and pulling."""
        self._stopping.set()
        self._pool.shutdown(wait=False, cancel_futures=True)
        if self._producer:
            self._server.stop()
        else:
            self._client.close()

    def _listen(self) -> None:
        self._stager: Stager = stager_for(self._device, self._append)
        host = get_ip() if self._config.host is None else self._config.host
        self._server = KvServer(
            self._leases,
            self._announcements,
            self._fingerprint,
            host,
            tls=self._tls,
            more_handlers=self._readable(),
        )
        self._address = self._server.start()
        threading.Thread(target=self._sweep, name="kv-sweep", daemon=True).start()

    def _readable(self) -> list[NixlHandler | LocateHandler]:
        """Lay leases where others can read them: peers with NIXL, or this node's processes."""
        self._arena: Arena | None = None
        if self._nixl is not None:
            self._arena = Arena(self._config.max_held_bytes)
            self._nixl.register(self._arena)
            return [NixlHandler(self._leases, self._fingerprint, self._nixl, self._arena)]
        if self._config.carrier == "object_ref":
            shared = SharedMemory(self._config.max_held_bytes)
            locate = LocateHandler(self._leases, self._fingerprint, shared)
            self._arena = locate.arena
            return [locate]
        return []

    def _connect(self) -> None:
        nixl = None
        if self._nixl is not None:
            nixl = NixlClient(self._nixl, Arena(LANDING_BYTES), self._tls)
            nixl.start()
        self._client = KvPuller(KvClient(self._tls, streams=self._config.streams), nixl)

    def _sweep(self) -> None:
        """Nothing steps an idle engine, so expiry has a thread of its own."""
        while not self._stopping.wait(_SWEEP_S):
            expired = self._leases.sweep()
            if expired:
                logger.warning("leases expired unpulled: count=%d", expired)

    def _append(self, order: Stage, layer: int, payload: memoryview) -> None:
        self._leases.open(order.lease_id, order.secret)
        whole = order.stop == order.tokens and layer == max(self._caches)
        for frame in pieces(Frame(layer, order.start, order.stop, payload), FRAME_BYTES):
            last = whole and frame.stop == order.stop
            sealed = seal(frame, order.lease_id, self._arena)
            self._leases.append(order.lease_id, sealed, last=last)

    def _pull(self, order: Pull) -> None:
        """One pull, start to end; its outcome is told to the scheduler in the next step."""
        failed = False
        started_s = time.monotonic()
        try:
            complete_s = self._fetch(order)
            self._await_writes()
            exposed_s = min(complete_s, time.monotonic() - started_s)
            with self._lock:
                self._exposed_s[order.request_id] = exposed_s
        except KvTransferError as error:
            failed = True
            logger.warning("pull failed: request=%s error=%s", order.request_id, error)
        finally:
            with self._lock:
                self._running.pop(order.request_id, None)
                self._block_tensors.pop(order.request_id, None)
                self._results.finished_recving.add(order.request_id)
                if failed:
                    self._results.failed_recving.add(order.request_id)

    def _await_writes(self) -> None:
        """Return when the writes of this pull are done: the model runs on another stream."""
        if self._device.type != "cpu":
            torch.cuda.current_stream(self._device).synchronize()

    def _fetch(self, order: Pull) -> float:
        """Returns for how many seconds the KV was complete at the peer when all was here."""
        if order.ticket["fingerprint"] != self._fingerprint:
            raise LayoutMismatch("kv: the ticket's layout is not this engine's")
        found = sources(self._rank, self._split, self._peer_split)
        return max([self._fetch_from(source, order) for source in found])

    def _fetch_from(self, source: Source, order: Pull) -> float:
        pull = self._client.pull(
            order.ticket["endpoints"][source.rank],
            order.ticket,
            self._fingerprint,
            order.start,
            self._config.pull_timeout_s,
        )
        with self._lock:
            self._running[order.request_id] = pull
        arrived = dict.fromkeys(range(source.layers.start, source.layers.stop), order.start)
        complete_s = pull.into(lambda frame: self._store(source, order, frame, arrived))
        if any(stop != order.stop for stop in arrived.values()):
            raise CorruptFrame("stream: some layers are not complete")
        return complete_s

    def _store(self, source: Source, order: Pull, frame: Frame, arrived: dict[int, int]) -> None:
        """Write a frame into the blocks, if this worker needs it.

        Its peer may hold more layers, and a relay streams the whole prompt.
        """
        lacking = from_token(frame, order.start)
        if lacking is not None and lacking.layer in arrived:
            self._write(source, order, lacking, arrived)

    def _write(self, source: Source, order: Pull, frame: Frame, arrived: dict[int, int]) -> None:
        """Frames of a layer come in token order, gapless."""
        if arrived[frame.layer] != frame.start or frame.stop > order.stop:
            raise CorruptFrame(f"stream: layer {frame.layer} tokens {frame.start}:{frame.stop}")
        held = self._peer_split.heads_of(source.rank)
        mine = self._split.heads_of(self._rank)
        cache = self._caches[frame.layer]
        shape = (frame.stop - frame.start, 2, len(held), cache.shape[3] // 2)
        kv = _tensor(frame.payload, cache.dtype, shape)
        self._layout.write(
            cache[:, _within(mine, source.heads)],
            self._block_tensor(order.request_id, order.blocks),
            frame.start,
            kv[:, :, _within(held, source.heads)],
        )
        arrived[frame.layer] = frame.stop

    def _block_tensor(self, order_id: str, blocks: list[int]) -> torch.Tensor:
        """`blocks` on the device, `[blocks]` int64, made once an order."""
        if order_id not in self._block_tensors:
            self._block_tensors[order_id] = torch.tensor(blocks, device=self._device)
        return self._block_tensors[order_id]


def _within(held: Span, part: Span) -> slice:
    """Where `part` of the model's heads lies in a tensor of the heads `held`."""
    return slice(part.start - held.start, part.stop - held.start)


def _tensor(
    payload: bytes | memoryview, dtype: torch.dtype, shape: tuple[int, ...]
) -> torch.Tensor:
    values = torch.frombuffer(bytearray(payload), dtype=dtype)
    if values.numel() != torch.Size(shape).numel():
        raise CorruptFrame(f"frame: {values.numel()} values do not fill {shape}")
    return values.view(shape)


@contextmanager
def _any_core() -> Iterator[None]:
    """Let threads made inside run on any core, not on the worker's compute core."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
