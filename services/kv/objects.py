"""KV as an object: collected from a prefill worker, offered again beside a decode worker.

An object is the very messages of the KV stream (frames with their digests, and the trailer),
as arrays over the bytes that came: Ray's object store copies each where it belongs and hands
it out without a copy. The decode worker checks the digests that the prefill worker made.
"""

from __future__ import annotations

import hmac
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import numpy as np
from numpy.typing import NDArray

from ..errors import CorruptFrame, KvTransferError
from ..types import Ticket
from .channels import OPTIONS, channel, listen
from .frames import TRAILER_LAYER, Trailer, decode, encode, layer_of
from .pull import transfer_error
from .rpc import PULL, PullQuery
from .tls import MutualTls

KvObject = list[NDArray[np.uint8]]  # one message each, [bytes]


def collect(ticket: Ticket, rank: int, timeout_s: float, tls: MutualTls | None = None) -> KvObject:
    """Pull one rank's KV from its worker, undigested. Raises KvTransferError."""
    query = PullQuery(ticket.lease_id, ticket.secret, ticket.fingerprint, 0, timeout_s)
    try:
        with channel(ticket.endpoints[rank], tls) as opened:
            stream: Any = opened.unary_stream(PULL)
            came = stream(query.packed(), timeout=timeout_s)
            kv = [np.frombuffer(message, dtype=np.uint8) for message in came]
    except grpc.RpcError as error:
        raise transfer_error(error) from error
    if not kv:
        raise KvTransferError("kv: the worker sent nothing")
    return kv


def part_of(kv: KvObject, query: PullQuery) -> Iterator[bytes]:
    """The messages of a query's layers, then a trailer. Raises KvTransferError if some lack."""
    sent = 0
    for seen, message in enumerate(map(bytes, kv)):
        layer = layer_of(message)
        if layer == TRAILER_LAYER:
            trailer = decode(message, query.lease_id)
            if not isinstance(trailer, Trailer) or trailer.frames != seen:
                raise CorruptFrame("kv: the object lacks frames")
            yield encode(Trailer(sent), query.lease_id)
            return
        if query.wants(layer):
            sent += 1
            yield message
    raise CorruptFrame("kv: the object has no trailer")


@dataclass(slots=True)
class _Offer:
    secret: str
    fingerprint: str
    kv: KvObject


class KvRelay:
    """Serves objects to an engine's decode workers, as their prefill worker would."""

    def __init__(self, host: str, tls: MutualTls | None = None, *, threads: int = 8) -> None:
        self._host = host
        self._tls = tls
        self._offers: dict[str, _Offer] = {}
        self._lock = threading.Lock()
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kv-relay"),
            handlers=[_Handler(self)],
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
            self._offers[ticket.lease_id] = _Offer(ticket.secret, ticket.fingerprint, kv)

    def withdraw(self, ticket: Ticket) -> None:
        """Forget the object. Idempotent."""
        with self._lock:
            self._offers.pop(ticket.lease_id, None)

    def pull(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream an object's messages, from its first token on: the worker skips what it has."""
        query = PullQuery.unpacked(message)
        with self._lock:
            offer = self._offers.get(query.lease_id)
        if offer is None or not hmac.compare_digest(offer.secret, query.secret):
            context.abort(grpc.StatusCode.NOT_FOUND, "kv: nothing is offered under this lease")
        elif offer.fingerprint != query.fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
        else:
            yield from part_of(offer.kv, query)


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, relay: KvRelay) -> None:
        self._relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != PULL:
            return None
        return grpc.unary_stream_rpc_method_handler(self._relay.pull)
