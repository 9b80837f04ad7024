"""Serves a worker's KV port over gRPC with raw messages (frames are not protobuf).

`Pull` streams a lease's frames, `Renew` prolongs a lease and `Release` drops it; the lease's
secret authenticates them. `Watch` announces the leases that may be pulled now, `Drain` waits until
nothing is held, `Stats` returns what is. Messages are msgpack maps.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import msgpack

from ..core.errors import InvalidRequest, LeaseNotFound
from ..core.types import Lease, Ticket
from .announcements import Announcement, Announcements
from .channels import OPTIONS, AioChannels, listen
from .frames import Trailer, encode
from .leases import LeaseGauges, LeaseStore
from .silence import with_beats
from .tls import TlsSource

SERVICE = "specprefill.v1.KvCache"
PULL = f"/{SERVICE}/Pull"
RENEW = f"/{SERVICE}/Renew"
RELEASE = f"/{SERVICE}/Release"
WATCH = f"/{SERVICE}/Watch"
DRAIN = f"/{SERVICE}/Drain"
STATS = f"/{SERVICE}/Stats"
_CALL_TIMEOUT_S = 2.0
_THREADS = 320  # at most: they are started when first needed
# Each of these holds a thread for as long as it lasts; more are refused, so that renewals and
# releases always find one.
_MOST_AT_ONCE = {PULL: 128, WATCH: 16, DRAIN: 8}
_MOST_LENDINGS = 128  # of other handlers; not among the pulls, as one may have to pull meanwhile
_LONGEST_DRAIN_S = 600.0
_HANG_UP_S = 0.5  # how long a drain may outlast its caller
_Kinds = dict[str, type | tuple[type, ...]]
_LEASE: _Kinds = {"lease_id": str, "secret": str}
_PULL: _Kinds = {**_LEASE, "fingerprint": str, "start": int, "timeout_s": (int, float)}
_PULL |= {"part": int, "parts": int}


@dataclass(frozen=True, slots=True)
class PullQuery:
    """A pull's selection: the layers with `layer % parts == part`, from token `start` on."""

    lease_id: str
    secret: str
    fingerprint: str
    start: int
    timeout_s: float  # for a lease that is still being computed
    part: int = 0
    parts: int = 1

    def pack(self) -> bytes:
        """Pack the query as a message."""
        return _pack(asdict(self))

    @classmethod
    def unpack(cls, message: bytes) -> PullQuery:
        """Invert `pack`. Raises InvalidRequest."""
        fields = _unpack_fields(message, _PULL)
        if fields["start"] < 0 or not 0 <= fields["part"] < fields["parts"]:
            raise InvalidRequest("kv: start, part and parts must be in range")
        return cls(**fields)

    def wants(self, layer: int) -> bool:
        """Return True if the layer is in this query's part."""
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
        tls: TlsSource | None = None,
        threads: int = _THREADS,
        sends_bytes: bool = True,
        more_handlers: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        """`sends_bytes` False: leases lie where only other handlers can read them."""
        self._leases = leases
        self._announcements = announcements
        self._fingerprint = fingerprint
        self._sends_bytes = sends_bytes
        self._host = host
        self._port = port
        self._tls = tls
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kv-serve"),
            handlers=[_Handler(self), *_limit_handlers(more_handlers)],
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
        yield from with_beats(self._messages(message, context))

    def _messages(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes | None]:
        query = _pull_query(message, self._fingerprint, context)
        if not self._sends_bytes:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: leases are in device memory")
        frames = self._leases.stream(query.lease_id, query.secret, timeout_s=query.timeout_s)
        sent = 0
        try:
            for frame in frames:
                wanted = query.wants(frame.layer)
                part = frame.from_token(query.start, query.lease_id) if wanted else None
                sent += part is not None
                yield None if part is None else bytes(part)
        except LeaseNotFound as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        yield encode(make_trailer(self._leases, query.lease_id, sent), query.lease_id)

    def renew(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Restart a lease's time; return False if the lease is gone."""
        query = _unpack_fields(message, _LEASE)
        return _pack(self._leases.renew(query["lease_id"], query["secret"]))

    def release(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Drop a lease. Idempotent."""
        query = _unpack_fields(message, _LEASE)
        return _pack(self._leases.release(query["lease_id"], query["secret"]))

    def watch(self, _message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream announcements for as long as the caller listens."""
        for announcement in self._announcements.listen(context.add_callback):
            yield _pack(asdict(announcement))

    def drain(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        """Wait, at most the query's `timeout_s`, until no lease is left; return False if one is.

        It ends when the caller hangs up.
        """
        timeout_s = _unpack_fields(message, {"timeout_s": (int, float)})["timeout_s"]
        give_up_s = time.monotonic() + min(timeout_s, _LONGEST_DRAIN_S)
        while context.is_active():
            left_s = give_up_s - time.monotonic()
            if self._leases.wait_empty(min(max(left_s, 0.0), _HANG_UP_S)):
                return _pack(True)
            if left_s <= 0:
                break
        return _pack(False)

    def stats(self, _message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Return the store's gauges."""
        return _pack(asdict(self._leases.gauges()))


def open_lending(
    message: bytes, fingerprint: str, context: grpc.ServicerContext
) -> tuple[PullQuery, threading.Event]:
    """Return a query that lends memory, and an event that is set when its reader hangs up.

    The call is aborted where the layouts differ.
    """
    query = _pull_query(message, fingerprint, context)
    gone = threading.Event()
    if not context.add_callback(gone.set):
        gone.set()  # it has ended before
    return query, gone


def make_trailer(leases: LeaseStore, lease_id: str, sent: int) -> Trailer:
    """Return the message that ends a stream of `sent` frames."""
    complete_s = leases.complete_for_s(lease_id)
    return Trailer(sent, None if complete_s is None else round(complete_s * 1e6))


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: KvServer) -> None:
        self._methods = {
            PULL: _stream_handler(PULL, server.pull),
            WATCH: _stream_handler(WATCH, server.watch),
            RENEW: _unary_handler(server.renew),
            RELEASE: _unary_handler(server.release),
            DRAIN: _unary_handler(_limit_calls(DRAIN, server.drain)),
            STATS: _unary_handler(server.stats),
        }

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        return self._methods.get(details.method)


Unary = Callable[[bytes, grpc.ServicerContext], bytes]
Streaming = Callable[[bytes, grpc.ServicerContext], Iterator[bytes]]


def _unary_handler(call: Unary) -> grpc.RpcMethodHandler[Any, Any]:
    """Return a handler that refuses a malformed message, whatever is wrong with it."""

    def call_checked(message: bytes, context: grpc.ServicerContext) -> bytes:
        try:
            return call(message, context)
        except InvalidRequest as error:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))

    return grpc.unary_unary_rpc_method_handler(call_checked)


def _stream_handler(method: str, call: Streaming) -> grpc.RpcMethodHandler[Any, Any]:
    places = _Places(_MOST_AT_ONCE[method], method)
    return grpc.unary_stream_rpc_method_handler(_limit_streams(call, places))


class _Places:
    """Bounds the calls that run at once. Thread-safe."""

    def __init__(self, most: int, calls: str) -> None:
        self._semaphore = threading.BoundedSemaphore(most)
        self._refusal = f"kv: at most {most} calls of {calls} at once"

    @contextmanager
    def take(self, context: grpc.ServicerContext) -> Iterator[None]:
        """Hold a place while inside; abort the call where none is free."""
        if not self._semaphore.acquire(blocking=False):
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, self._refusal)
        try:
            yield
        finally:
            self._semaphore.release()


def _limit_calls(method: str, call: Unary) -> Unary:
    """Refuse more calls at once than `_MOST_AT_ONCE` allows."""
    places = _Places(_MOST_AT_ONCE[method], method)

    def call_bounded(message: bytes, context: grpc.ServicerContext) -> bytes:
        with places.take(context):
            return call(message, context)

    return call_bounded


def _limit_streams(call: Streaming, places: _Places) -> Streaming:
    """Refuse more streams than there are places; a stream holds its place until it ends."""

    def call_bounded(message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        with places.take(context):
            yield from call(message, context)

    return call_bounded


def _limit_handlers(handlers: Sequence[grpc.GenericRpcHandler]) -> list[grpc.GenericRpcHandler]:
    places = _Places(_MOST_LENDINGS, "handlers that lend memory")
    return [_LimitedHandler(handler, places) for handler in handlers]


class _LimitedHandler(grpc.GenericRpcHandler):
    """Another handler, whose streams need places."""

    def __init__(self, handler: grpc.GenericRpcHandler, places: _Places) -> None:
        self._handler = handler
        self._places = places

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        found = self._handler.service(details)
        if found is None or found.unary_stream is None:
            return found
        return grpc.unary_stream_rpc_method_handler(
            _limit_streams(found.unary_stream, self._places)
        )


def _pull_query(message: bytes, fingerprint: str, context: grpc.ServicerContext) -> PullQuery:
    """Return the query; abort the call where it is malformed or the layouts differ."""
    try:
        query = PullQuery.unpack(message)
    except InvalidRequest as error:
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
    if query.fingerprint != fingerprint:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
    return query


def _unpack_fields(message: bytes, kinds: _Kinds) -> dict[str, Any]:
    """Unpack a map of exactly these fields. Raises InvalidRequest."""
    try:
        fields = msgpack.unpackb(message)
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        raise InvalidRequest("kv: the message is not msgpack") from error
    if not isinstance(fields, dict) or fields.keys() != kinds.keys():
        raise InvalidRequest(f"kv: the message must be a map of {', '.join(kinds)}")
    for name, kind in kinds.items():
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise InvalidRequest(f"kv: {name} has the wrong type")
    return fields


def _pack(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


class KvPeers:
    """Talks to prefill workers' KV ports from an asyncio program; one channel per peer."""

    def __init__(self, tls: TlsSource | None = None) -> None:
        self._channels = AioChannels(tls)

    async def release(self, ticket: Ticket) -> None:
        """Drop the lease at every rank. A peer that is gone holds nothing: not an error."""
        await self.release_at(ticket.endpoints, ticket.lease)

    async def release_at(self, peers: Sequence[str], lease: Lease) -> None:
        """Drop a lease whose ticket was not made or got lost. See `release`."""
        await self._at_every_rank(RELEASE, peers, lease)

    async def renew(self, ticket: Ticket) -> bool:
        """Restart the lease's time at every rank. False if it is gone at one of them."""
        return all(await self._at_every_rank(RENEW, ticket.endpoints, ticket.lease))

    async def announcements(self, peer: str) -> AsyncGenerator[Announcement]:
        """Yield the announcements of `peer` from now on; end when it, or its channel, is gone."""
        try:
            async for message in await self._channels.stream(peer, WATCH, b""):
                yield Announcement(**msgpack.unpackb(message))
        except grpc.aio.AioRpcError:
            return
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            return  # the channel was closed: see `AioChannels`

    async def drain(self, peer: str, timeout_s: float) -> bool:
        """Wait until `peer` holds nothing. False if `timeout_s` passed first."""
        query = {"timeout_s": timeout_s}
        patience_s = timeout_s + _CALL_TIMEOUT_S
        return bool(await self._call(peer, DRAIN, query, patience_s, if_gone=True))

    async def gauges(self, peer: str) -> LeaseGauges | None:
        """Return the gauges of `peer`; None if it does not answer."""
        stats = await self._call(peer, STATS, {}, _CALL_TIMEOUT_S, if_gone=None)
        return None if stats is None else LeaseGauges(**stats)

    async def close(self) -> None:
        """Close every channel."""
        await self._channels.close()

    async def _at_every_rank(self, method: str, peers: Sequence[str], lease: Lease) -> list[bool]:
        query = {"lease_id": lease.id, "secret": lease.secret}
        done: list[bool] = await asyncio.gather(
            *(self._call(peer, method, query, _CALL_TIMEOUT_S, if_gone=False) for peer in peers)
        )
        return done

    async def _call(
        self, peer: str, method: str, query: dict[str, Any], timeout_s: float, *, if_gone: Any
    ) -> Any:
        call = await self._channels.ask(peer, method, msgpack.packb(query), timeout_s)
        try:
            return msgpack.unpackb(await call)
        except grpc.aio.AioRpcError:
            return if_gone
