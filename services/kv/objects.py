"""KV as one object: collected from a prefill worker, offered again beside a decode worker.

The bytes are the very messages of the KV stream (frames with their digests, and the trailer),
each behind its length. Whoever carries the object (Ray's object store) need not understand
them, and the decode worker checks the digests that the prefill worker made.
"""

from __future__ import annotations

import hmac
import struct
import threading
from collections.abc import Iterator
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import grpc
import msgpack
import numpy as np
from numpy.typing import NDArray

from ..errors import KvTransferError
from ..types import Ticket
from .channels import OPTIONS, channel, listen
from .rpc import PULL, transfer_error
from .tls import MutualTls

_LENGTH = struct.Struct("!I")

KvObject = NDArray[np.uint8]  # [bytes]: length, message, length, message, ...


def collect(ticket: Ticket, rank: int, timeout_s: float, tls: MutualTls | None = None) -> KvObject:
    """Pull one rank's KV from its worker. Uses the lease up. Raises KvTransferError."""
    query = {
        "lease_id": ticket.lease_id,
        "secret": ticket.secret,
        "fingerprint": ticket.fingerprint,
        "start": 0,
        "timeout_s": timeout_s,
    }
    parts: list[bytes] = []
    try:
        with channel(ticket.endpoints[rank], tls) as opened:
            stream: Any = opened.unary_stream(PULL)
            for message in stream(msgpack.packb(query), timeout=timeout_s):
                parts += (_LENGTH.pack(len(message)), message)
    except grpc.RpcError as error:
        raise transfer_error(error) from error
    if not parts:
        raise KvTransferError("kv: the worker sent nothing")
    return np.frombuffer(b"".join(parts), dtype=np.uint8)


def messages(kv: KvObject) -> Iterator[bytes]:
    """The messages inside an object. Raises KvTransferError if it is cut short."""
    view = kv.data
    place = 0
    while place < len(view):
        stop = place + _LENGTH.size
        size = _LENGTH.unpack_from(view, place)[0] if stop <= len(view) else len(view)
        if stop + size > len(view):
            raise KvTransferError("kv: the object is cut short")
        yield bytes(view[stop : stop + size])
        place = stop + size


@dataclass(slots=True)
class _Offer:
    secret: str
    fingerprint: str
    kv: KvObject


class KvRelay:
    """Serves objects to the decode workers of this node, as their prefill worker would."""

    def __init__(self, tls: MutualTls | None = None, *, threads: int = 8) -> None:
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
        """Listen on a free port of the loopback: only this node's workers pull here."""
        self._address = listen(self._server, "127.0.0.1", self._tls)
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
        """Stream an object's messages, all of them: the worker skips what it has."""
        query = msgpack.unpackb(message)
        with self._lock:
            offer = self._offers.get(query["lease_id"])
        if offer is None or not hmac.compare_digest(offer.secret, query["secret"]):
            context.abort(grpc.StatusCode.NOT_FOUND, "kv: nothing is offered under this lease")
        elif offer.fingerprint != query["fingerprint"]:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
        else:
            yield from messages(offer.kv)


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, relay: KvRelay) -> None:
        self._relay = relay

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method != PULL:
            return None
        return grpc.unary_stream_rpc_method_handler(self._relay.pull)
