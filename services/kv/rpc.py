"""What a worker serves on its KV port, over gRPC with raw messages (frames are not protobuf).

`Pull` streams a lease's frames, `Renew` prolongs a lease and `Release` drops it; the lease's
secret authenticates them. `Watch` tells which leases may be pulled now, `Drain` waits until
nothing is held, `Stats` tells what is. Messages are msgpack maps.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from concurrent import futures
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import msgpack

from ..errors import LeaseNotFound
from ..types import Ticket
from .announcements import Announcement, Announcements
from .channels import OPTIONS, aio_channel, listen
from .frames import Trailer, encode
from .leases import LeaseGauges, LeaseStore
from .tls import MutualTls

SERVICE = "specprefill.v1.KvCache"
PULL = f"/{SERVICE}/Pull"
RENEW = f"/{SERVICE}/Renew"
RELEASE = f"/{SERVICE}/Release"
WATCH = f"/{SERVICE}/Watch"
DRAIN = f"/{SERVICE}/Drain"
STATS = f"/{SERVICE}/Stats"
_CALL_TIMEOUT_S = 2.0
_THREADS = 64  # each pull under way and each drain holds one


@dataclass(frozen=True, slots=True)
class PullQuery:
    """What a pull asks for: the layers with `layer % parts == part`, from token `start` on."""

    lease_id: str
    secret: str
    fingerprint: str
    start: int
    timeout_s: float  # for a lease that is still being computed
    part: int = 0
    parts: int = 1

    def packed(self) -> bytes:
        """As a message."""
        return _packed(asdict(self))

    @classmethod
    def unpacked(cls, message: bytes) -> PullQuery:
        """Inverse of `packed`."""
        return cls(**msgpack.unpackb(message))

    def wants(self, layer: int) -> bool:
        """Whether the layer is in this query's part."""
        return layer % self.parts == self.part


class KvServer:
    """Serves one worker's leases on a port of its own."""

    def __init__(
        self,
        leases: LeaseStore,
        announcements: Announcements,
        fingerprint: str,
        host: str,
        *,
        port: int = 0,
        tls: MutualTls | None = None,
        threads: int = _THREADS,
        more_handlers: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        self._leases = leases
        self._announcements = announcements
        self._fingerprint = fingerprint
        self._host = host
        self._port = port
        self._tls = tls
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kv-serve"),
            handlers=[_Handler(self), *more_handlers],
            options=OPTIONS,
        )

    def start(self) -> str:
        """Listen, on a free port if none was given. Returns `host:port`."""
        address = listen(self._server, self._host, self._tls, self._port)
        self._server.start()
        return address

    def stop(self) -> None:
        """Refuse new calls and end those under way."""
        self._server.stop(grace=0).wait()

    def pull(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream a lease's frames and the trailer. gRPC takes the next one when it has room."""
        query = PullQuery.unpacked(message)
        if query.fingerprint != self._fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
        frames = self._leases.stream(query.lease_id, query.secret, timeout_s=query.timeout_s)
        sent = 0
        try:
            for frame in frames:
                wanted = query.wants(frame.layer)
                part = frame.from_token(query.start, query.lease_id) if wanted else None
                if part is not None:
                    sent += 1
                    yield bytes(part)
        except LeaseNotFound as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        yield encode(trailer(self._leases, query.lease_id, sent), query.lease_id)

    def renew(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Start a lease's time again; tell whether it is still there."""
        query = msgpack.unpackb(message)
        return _packed(self._leases.renew(query["lease_id"], query["secret"]))

    def release(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Drop a lease. Idempotent."""
        query = msgpack.unpackb(message)
        return _packed(self._leases.release(query["lease_id"], query["secret"]))

    def watch(self, _message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream announcements for as long as the caller listens."""
        for announcement in self._announcements.listen(context.add_callback):
            yield _packed(asdict(announcement))

    def drain(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Wait, at most the query's `timeout_s`, until every lease is gone; tell whether."""
        return _packed(self._leases.wait_empty(msgpack.unpackb(message)["timeout_s"]))

    def stats(self, _message: bytes, _context: grpc.ServicerContext) -> bytes:
        """The store's gauges."""
        return _packed(asdict(self._leases.gauges()))


def lending(
    message: bytes, fingerprint: str, context: grpc.ServicerContext
) -> tuple[PullQuery, threading.Event]:
    """A query by which memory is lent, and the event that its reader has hung up.

    The call is aborted where the layouts differ.
    """
    query = PullQuery.unpacked(message)
    if query.fingerprint != fingerprint:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
    gone = threading.Event()
    if not context.add_callback(gone.set):
        gone.set()  # it has ended before
    return query, gone


def trailer(leases: LeaseStore, lease_id: str, sent: int) -> Trailer:
    """What ends a stream of `sent` frames."""
    complete_s = leases.complete_for_s(lease_id)
    return Trailer(sent, None if complete_s is None else round(complete_s * 1e6))


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: KvServer) -> None:
        self._server = server

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method == PULL:
            return grpc.unary_stream_rpc_method_handler(self._server.pull)
        if details.method == WATCH:
            return grpc.unary_stream_rpc_method_handler(self._server.watch)
        unary = {
            RENEW: self._server.renew,
            RELEASE: self._server.release,
            DRAIN: self._server.drain,
            STATS: self._server.stats,
        }.get(details.method)
        return None if unary is None else grpc.unary_unary_rpc_method_handler(unary)


def _packed(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


class KvPeers:
    """Talks to prefill workers' KV ports from an asyncio program; one channel per peer."""

    def __init__(self, tls: MutualTls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def release(self, ticket: Ticket) -> None:
        """Drop the lease at every rank. A peer that is gone holds nothing: not an error."""
        await self._at_every_rank(RELEASE, ticket)

    async def renew(self, ticket: Ticket) -> bool:
        """Start the lease's time again at every rank. False if it is gone at one of them."""
        return all(await self._at_every_rank(RENEW, ticket))

    async def announcements(self, peer: str) -> AsyncIterator[Announcement]:
        """What `peer` announces from now on; ends when it is gone."""
        watch: Any = self._channel(peer).unary_stream(WATCH)
        try:
            async for message in watch(b""):
                yield Announcement(**msgpack.unpackb(message))
        except grpc.aio.AioRpcError:
            return

    async def drain(self, peer: str, timeout_s: float) -> bool:
        """Wait until `peer` holds nothing. False if `timeout_s` passed first."""
        query = {"timeout_s": timeout_s}
        patience_s = timeout_s + _CALL_TIMEOUT_S
        return bool(await self._call(peer, DRAIN, query, patience_s, if_gone=True))

    async def gauges(self, peer: str) -> LeaseGauges | None:
        """What `peer` holds; None if it does not answer."""
        stats = await self._call(peer, STATS, {}, _CALL_TIMEOUT_S, if_gone=None)
        return None if stats is None else LeaseGauges(**stats)

    async def close(self) -> None:
        """Close every channel."""
        channels, self._channels = self._channels, {}
        for opened in channels.values():
            await opened.close()

    async def _at_every_rank(self, method: str, ticket: Ticket) -> list[bool]:
        query = {"lease_id": ticket.lease_id, "secret": ticket.secret}
        done: list[bool] = await asyncio.gather(
            *(
                self._call(peer, method, query, _CALL_TIMEOUT_S, if_gone=False)
                for peer in ticket.endpoints
            )
        )
        return done

    async def _call(
        self, peer: str, method: str, query: dict[str, Any], timeout_s: float, *, if_gone: Any
    ) -> Any:
        call: Any = self._channel(peer).unary_unary(method)
        try:
            return msgpack.unpackb(await call(msgpack.packb(query), timeout=timeout_s))
        except grpc.aio.AioRpcError:
            return if_gone

    def _channel(self, peer: str) -> grpc.aio.Channel:
        if peer not in self._channels:
            self._channels[peer] = aio_channel(peer, self._tls)
        return self._channels[peer]
