"""KV as an object: collected from a prefill worker, offered again beside a decode worker.

An object is the very messages of the KV stream (frames with their digests, and the trailer) in
a few large arrays, and an index of where in them each message lies: Ray's object store copies
each array once and hands it out without a copy. A worker of the same node lends the memory that
the messages lie in; any other sends them. The decode worker checks the digests that the prefill
worker made.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import msgpack
import numpy as np
from numpy.typing import NDArray

from ...core.errors import CorruptFrame, KvTransferError
from ...core.types import Ticket
from ..channels import OPTIONS, Channels, listen
from ..frames import TRAILER_LAYER, Trailer, decode, encode, layer_of
from ..pull import transfer_error
from ..rpc import PULL, PullQuery
from ..silence import messages_of
from ..tls import TlsSource
from .shared_memory import LOCATE, Mappings, MessagePlaces

KvObject = list[NDArray[np.uint8]]  # the index as msgpack, then the arrays that it points into

_GAP = 64  # messages no further apart are one array


class KvCollector:
    """Takes KV from prefill workers; connections and mappings are kept. Thread-safe."""

    def __init__(self, tls: TlsSource | None = None) -> None:
        self._mappings = Mappings()
        self._channels = Channels(tls)

    def close(self) -> None:
        """Close every connection."""
        self._channels.close()

    @contextmanager
    def collect(self, ticket: Ticket, rank: int, timeout_s: float) -> Iterator[KvObject]:
        """Hold one rank's KV, undigested, while inside: the arrays are the worker's memory.

        Raises KvTransferError.
        """
        peer = ticket.endpoints[rank]
        query = PullQuery(ticket.lease.id, ticket.lease.secret, ticket.fingerprint, 0, timeout_s)
        # The worker ends it when its engine goes silent.
        lending = self._channels.stream(peer, LOCATE, query.pack(), retry_s=timeout_s)
        try:
            lent = self._borrow(peer, lending)
            yield self._receive(peer, query) if lent is None else lent
        finally:
            lending.cancel()  # the worker may have its memory back

    def _borrow(self, peer: str, lending: Any) -> KvObject | None:
        """Return the messages in place; None if the worker cannot lend, or is on another node."""
        try:
            message = next(lending, None)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return None
            raise transfer_error(error) from error
        if message is None:
            return None
        located = MessagePlaces.unpack(message)
        memory = self._mappings.view(peer, located.region)
        return None if memory is None else _lay_out(memory, located)

    def _receive(self, peer: str, query: PullQuery) -> KvObject:
        """Return the messages, received through the socket, in an array each."""
        stream = self._channels.stream(peer, PULL, query.pack(), retry_s=query.timeout_s)
        try:
            came = list(messages_of(stream, query.timeout_s))
        except grpc.RpcError as error:
            raise transfer_error(error) from error
        if not came:
            raise KvTransferError("kv: the worker sent nothing")
        return as_object(came)


def as_object(came: Sequence[bytes]) -> KvObject:
    """Return messages that lie anywhere as an object, in an array each."""
    index = [(number, 0, len(message)) for number, message in enumerate(came)]
    return _object(index, [_array(message) for message in came])


def messages(kv: KvObject) -> Iterator[memoryview]:
    """Return an object's messages, in order. Raises CorruptFrame if the index is out of range."""
    try:
        index, arrays = msgpack.unpackb(kv[0].data), kv[1:]
        for number, start, size in index:
            yield arrays[number].data[start : start + size]
    except (msgpack.UnpackException, ValueError, TypeError, IndexError) as error:
        raise CorruptFrame("kv: the object's index is damaged") from error


def part_of(kv: KvObject, query: PullQuery) -> Iterator[bytes]:
    """Yield the messages of a query's layers, then a trailer. Raises KvTransferError on a gap."""
    sent = 0
    for seen, message in enumerate(messages(kv)):
        layer = layer_of(message)
        if layer == TRAILER_LAYER:
            trailer = decode(message, query.lease_id)
            if not isinstance(trailer, Trailer) or trailer.frames != seen:
                raise CorruptFrame("kv: the object lacks frames")
            yield encode(Trailer(sent), query.lease_id)
            return
        if query.wants(layer):
            sent += 1
            yield bytes(message)
    raise CorruptFrame("kv: the object has no trailer")


def _lay_out(memory: NDArray[np.uint8], located: MessagePlaces) -> KvObject:
    """Return as few arrays over `memory` as hold all messages: neighbours stay together."""
    stretches: list[tuple[int, int]] = []
    index: list[tuple[int, int, int]] = []
    for start, size in located.places:
        adjacent = stretches and 0 <= start - stretches[-1][1] < _GAP
        first = stretches.pop()[0] if adjacent else start
        index.append((len(stretches), start - first, size))
        stretches.append((first, start + size))
    index.append((len(stretches), 0, len(located.trailer)))
    arrays = [memory[start:stop] for start, stop in stretches]
    return _object(index, [*arrays, _array(located.trailer)])


def _object(index: Sequence[tuple[int, int, int]], arrays: list[NDArray[np.uint8]]) -> KvObject:
    return [_array(msgpack.packb(index)), *arrays]


def _array(message: bytes) -> NDArray[np.uint8]:
    return np.frombuffer(message, dtype=np.uint8)


@dataclass(slots=True)
class _Offer:
    secret: str
    fingerprint: str
    kv: KvObject


class KvRelay:
    """Serves objects to an engine's decode workers, as their prefill worker would."""

    def __init__(self, host: str, tls: TlsSource | None = None, *, threads: int = 8) -> None:
        self._host = host
        self._tls = tls
        self._offers: dict[str, _Offer] = {}
        self._lock = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kv-relay"),
            handlers=[_RelayHandler(self)],
            options=OPTIONS,
        )
        self._address = ""

    def start(self) -> None:
        """Listen on a free port: the engine's workers may be on other nodes."""
        self._address = listen(self._server, self._host, self._tls)
        self._server.start()

    def stop(self) -> None:
        """End every pull under way."""
        self._server.stop(grace=0).wait()

    @property
    def address(self) -> str:
        """`host:port` to put into a ticket."""
        return self._address

    def offer(self, ticket: Ticket, kv: KvObject) -> None:
        """Let `kv` be pulled with the ticket, any number of times, until withdrawn."""
        with self._lock:
            self._offers[ticket.lease.id] = _Offer(ticket.lease.secret, ticket.fingerprint, kv)

    def withdraw(self, ticket: Ticket) -> None:
        """Forget the object. Idempotent."""
        with self._lock:
            self._offers.pop(ticket.lease.id, None)

    def pull(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream an object's messages, from its first token on: the worker skips what it has."""
        query = PullQuery.unpack(message)
        with self._lock:
            offer = self._offers.get(query.lease_id)
        if offer is None or not hmac.compare_digest(offer.secret, query.secret):
            context.abort(grpc.StatusCode.NOT_FOUND, "kv: nothing is offered under this lease")
        elif offer.fingerprint != query.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
        else:
            yield from part_of(offer.kv, query)


class _RelayHandler(grpc.GenericRpcHandler):
    def __init__(self, relay: KvRelay) -> None:
        self._relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != PULL:
            return None
        return grpc.unary_stream_rpc_method_handler(self._relay.pull)
