"""The decode side of a worker: pulls KV in the background, into blocks that wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from ...core.errors import CorruptFrame, KvTransferError, LayoutMismatch
from ...core.types import Span
from ...kv.carriers import KvPuller, PullClient, PullHandle
from ...kv.frames import FRAME_BYTES, Frame, from_token
from ...kv.nixl.agent import NixlAgent
from ...kv.nixl.arena import Arena
from ...kv.nixl.reads import LANDING_BYTES, NixlClient
from ...kv.pull import KvClient
from ...kv.shards import ShardSource, Split, sources
from ...kv.tls import TlsSource
from .caches import Caches
from .device import CopyEvent, CopyStream, Device
from .device_memory import Landing
from .orders import HandoffConfig, Orders, Pull, PullTimes
from .ring import ring_of
from .states import ROW_BYTES

logger = logging.getLogger("vllm.specprefill.handoff")

_PULL_THREADS = 64  # a pull may last as long as the prefill that it pulls from

Store = Callable[[torch.Tensor], None]


@dataclass(frozen=True, slots=True)
class WorkerPlace:
    """The part of the model that this worker has, and how the peers share the model."""

    rank: int
    own: Split
    peers: Split


@dataclass(slots=True)
class _Arrival:
    """One lease's KV on its way into a request's blocks."""

    order: Pull
    source: ShardSource
    stream: CopyStream
    stops: dict[int, int]  # by layer: tokens, or rows of its state, before it are there
    ends: dict[int, int]  # by layer: where it is complete


class Puller:
    """Complete when it is made. Pulls have threads of their own."""

    def __init__(
        self,
        config: HandoffConfig,
        caches: Caches,
        device: Device,
        place: WorkerPlace,
        *,
        nixl: NixlAgent | None,
        tls: TlsSource | None,
    ) -> None:
        self._caches = caches
        self._device = device
        self._place = place
        self._pull_timeout_s = config.pull_timeout_s
        # A frame holds at least one token, of all heads that its holder has.
        frame_bytes = max(FRAME_BYTES, _token_bytes(caches, place.peers))
        self._ring = ring_of(device, config.staging_bytes, frame_bytes)
        self._lock = threading.Lock()
        self._results = KVConnectorTransferResults()
        self._running: dict[str, list[PullHandle]] = {}
        self._exposed_s: dict[str, float] = {}
        self._threads = ThreadPoolExecutor(_PULL_THREADS, thread_name_prefix="kv-pull")
        self._landing = Landing(device, tls) if config.memory == "device" else None
        self._client: PullClient
        if self._landing is None:
            self._client = KvPuller(KvClient(tls, streams=config.streams), _nixl_client(nixl, tls))
        else:
            self._client = self._landing.client

    def start_pulls(self, orders: Orders) -> None:
        """Start this step's pulls. Called before the step is launched.

        A block's last owner may still be read or written by steps that were launched before.
        """
        if orders.pulls:
            computed = self._device.mark_computed()
            for order in orders.pulls:
                self._threads.submit(self._pull, order, computed)

    def take_results(self, aborted: set[str]) -> KVConnectorTransferResults:
        """Return what has ended. Cancel the pulls of aborted requests, then report them."""
        with self._lock:
            for request_id in aborted & self._running.keys():
                for pull in self._running[request_id]:
                    pull.cancel()
            results, self._results = self._results, KVConnectorTransferResults()
            return results

    def take_pull_times(self) -> PullTimes | None:
        """Return the times of the pulls that have ended, once."""
        with self._lock:
            times, self._exposed_s = self._exposed_s, {}
            return PullTimes(times) if times else None

    def stop(self) -> None:
        """End all pulls."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._client.close()

    def _pull(self, order: Pull, computed: CopyEvent) -> None:
        """Run one pull. It has failed unless all of its KV is known to be in place."""
        exposed_s: float | None = None
        started_s = time.monotonic()
        try:
            complete_s = self._fetch(order, computed)
            exposed_s = min(complete_s, time.monotonic() - started_s)
        except KvTransferError as error:
            logger.warning("pull failed: request=%s error=%s", order.request_id, error)
        except Exception:  # the boundary of a thread: the request fails, whatever it was
            logger.exception("pull failed: request=%s", order.request_id)
        finally:
            self._report(order, exposed_s)

    def _report(self, order: Pull, exposed_s: float | None) -> None:
        """Queue the report for the scheduler's next step; `exposed_s` None: the KV is not there."""
        self._caches.forget(order.request_id)
        with self._lock:
            self._running.pop(order.request_id, None)
            self._results.finished_recving.add(order.request_id)
            if exposed_s is None:
                self._results.failed_recving.add(order.request_id)
            else:
                self._exposed_s[order.request_id] = exposed_s

    def _fetch(self, order: Pull, computed: CopyEvent) -> float:
        """Pull the KV; return how many seconds it was complete at the peer when all was here."""
        if order.ticket.fingerprint != self._caches.fingerprint:
            raise LayoutMismatch("kv: the ticket's layout is not this engine's")
        stream = self._device.stream()
        stream.order_after(computed)
        for layer in self._caches.by_layer:
            self._caches.block_tensor(order.request_id, layer, order.blocks)
        stream.order_after(self._device.mark_computed())  # those tensors, by this thread
        found = self._sources()
        try:
            arrivals = [self._arrival(order, source, stream) for source in found]
            complete_s = self._fetch_all(arrivals)
        finally:
            stream.wait()  # a block is free for others only when nothing writes it any more
        return complete_s

    def _sources(self) -> tuple[ShardSource, ...]:
        """Return the peers to pull from. A state comes from the same rank, and so all else."""
        rank, own = self._place.rank, self._place.own
        if self._caches.states:
            return (ShardSource(rank, own.layers_of(rank), own.heads_of(rank)),)
        return sources(rank, own, self._place.peers)

    def _arrival(self, order: Pull, source: ShardSource, stream: CopyStream) -> _Arrival:
        """Return what is to come from one peer: tokens of its layers, and rows of states."""
        layers = [
            layer
            for layer in range(source.layers.start, source.layers.stop)
            if layer in self._caches.by_layer
        ]
        states = self._caches.states  # split as the peer's: all of them are here
        return _Arrival(
            order,
            source,
            stream,
            dict.fromkeys(layers, order.start) | dict.fromkeys(states, order.stop),
            dict.fromkeys(layers, order.stop)
            | {layer: order.stop + state.rows for layer, state in states.items()},
        )

    def _fetch_all(self, arrivals: Sequence[_Arrival]) -> float:
        """Pull from all peers at once, since each pull lasts as long as the prefill does.

        Where one fails the others are of no use; the first failure is their cause.
        """
        failures: list[Exception] = []

        def fetch(arrival: _Arrival) -> float:
            try:
                return self._fetch_from(arrival, failures)
            except Exception as error:  # noqa: BLE001  # raised again below
                failures.append(error)
                self._cancel(arrival.order.request_id)
                return 0.0

        first, *others = arrivals
        with ThreadPoolExecutor(max(1, len(others)), "kv-peer") as threads:
            rest = [threads.submit(fetch, other) for other in others]  # no thread without any
            complete_s = fetch(first)
        if failures:
            raise failures[0]
        return max([complete_s, *(each.result() for each in rest)])

    def _cancel(self, request_id: str) -> None:
        with self._lock:
            for pull in self._running.get(request_id, ()):
                pull.cancel()

    def _fetch_from(self, arrival: _Arrival, failures: Sequence[Exception]) -> float:
        order, source = arrival.order, arrival.source
        pull = self._client.pull(
            order.ticket.endpoints[source.rank],
            order.ticket,
            self._caches.fingerprint,
            order.start,
            self._pull_timeout_s,
        )
        with self._lock:
            self._running.setdefault(order.request_id, []).append(pull)
            if failures:  # another one has failed while this one was begun
                pull.cancel()
        complete_s = pull.deliver_to(lambda frame: self._store(arrival, frame))
        if arrival.stops != arrival.ends:
            raise CorruptFrame("stream: some layers are not complete")
        return complete_s

    def _store(self, arrival: _Arrival, frame: Frame) -> None:
        """Write a frame into the blocks, if this worker needs it.

        Its peer may hold more layers, and a relay streams the whole prompt.
        """
        lacking = from_token(frame, arrival.order.start)
        if lacking is not None and lacking.layer in arrival.stops:
            self._write(arrival, lacking)

    def _write(self, arrival: _Arrival, frame: Frame) -> None:
        """Write a frame; frames of a layer come in order, gapless."""
        layer = frame.layer
        if arrival.stops[layer] != frame.start or frame.stop > arrival.ends[layer]:
            raise CorruptFrame(
                f"stream: unexpected tokens {frame.start}:{frame.stop} of layer {layer}"
            )
        if layer in self._caches.states:
            self._write_state(arrival, frame)
        else:
            self._write_tokens(arrival, frame)
        arrival.stops[layer] = frame.stop

    def _write_state(self, arrival: _Arrival, frame: Frame) -> None:
        """Write rows of a recurrent layer's state into its block."""
        state = self._caches.states[frame.layer]
        block = self._caches.state_block(frame.layer, arrival.order.blocks)
        if block is None:
            raise CorruptFrame(f"stream: no block for the state of layer {frame.layer}")

        def store(raw: torch.Tensor) -> None:
            state.write(block, frame.start - arrival.order.stop, raw.view(-1, ROW_BYTES))

        self._write_bytes(arrival, frame, (frame.stop - frame.start) * ROW_BYTES, store)

    def _write_tokens(self, arrival: _Arrival, frame: Frame) -> None:
        """Write keys and values, or latents, of the heads that this worker needs."""
        held = self._place.peers.heads_of(arrival.source.rank)
        mine = self._place.own.heads_of(self._place.rank)
        cache = self._caches.by_layer[frame.layer]
        parts = self._caches.layout.parts
        shape = (frame.stop - frame.start, parts, len(held), cache.shape[3] // parts)
        wanted = arrival.source.heads

        def store(raw: torch.Tensor) -> None:
            kv = raw.view(cache.dtype).view(shape)
            self._caches.layout.write(
                cache[:, _head_slice(mine, wanted)],
                self._caches.block_tensor(
                    arrival.order.request_id, frame.layer, arrival.order.blocks
                ),
                frame.start,
                kv[:, :, _head_slice(held, wanted)],
            )

        self._write_bytes(arrival, frame, torch.Size(shape).numel() * cache.itemsize, store)

    def _write_bytes(self, arrival: _Arrival, frame: Frame, size: int, store: Store) -> None:
        """Write a frame's bytes, wherever they are, into the cache."""
        if len(frame.payload) != size:
            raise CorruptFrame(f"frame: {len(frame.payload)} bytes, {size} are expected")
        if self._landing is None:
            self._copy_in(arrival.stream, frame, size, store)
            return
        there = self._landing.landed_bytes(memoryview(frame.payload))
        self._landing.hold_until(arrival.stream.run(lambda: store(there)), frame.payload)

    def _copy_in(self, stream: CopyStream, frame: Frame, size: int, store: Store) -> None:
        """Copy a frame's bytes into a buffer of the ring, and on into the cache."""
        buffer = self._ring.take()
        try:
            landed = buffer[:size]
            landed.numpy()[:] = memoryview(frame.payload)
            copied = stream.write(landed, store)
        except BaseException:
            stream.wait()
            self._ring.give(buffer)
            raise
        self._ring.give_after(copied, buffer)


def _token_bytes(caches: Caches, peers: Split) -> int:
    """Return the bytes of one token of one layer as a peer holds it."""
    cache = next(iter(caches.by_layer.values()))
    heads = max(len(peers.heads_of(rank)) for rank in range(peers.tensor))
    return int(heads * cache.shape[3] * cache.itemsize)


def _nixl_client(nixl: NixlAgent | None, tls: TlsSource | None) -> NixlClient | None:
    if nixl is None:
        return None
    client = NixlClient(nixl, Arena(LANDING_BYTES), tls)
    client.start()
    return client


def _head_slice(held: Span, part: Span) -> slice:
    """Return the slice of `part` of the model's heads in a tensor of the heads `held`."""
    return slice(part.start - held.start, part.stop - held.start)
