"""The KV stream between workers, over gRPC with raw messages (frames are not protobuf).

`Pull` streams a lease's frames and `Release` drops a lease; the lease's secret authenticates
both. `Drain` waits until nothing is held, `Stats` tells what is. Messages are msgpack maps.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent import futures
from dataclasses import asdict
from typing import Any

import grpc
import msgpack

from ..errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from ..types import Ticket
from .channels import OPTIONS, aio_channel, channel, listen
from .frames import Frame, Trailer, decode, encode
from .leases import LeaseGauges, LeaseStore
from .tls import MutualTls

SERVICE = "specprefill.v1.KvCache"
PULL = f"/{SERVICE}/Pull"
RELEASE = f"/{SERVICE}/Release"
DRAIN = f"/{SERVICE}/Drain"
STATS = f"/{SERVICE}/Stats"
_CALL_TIMEOUT_S = 2.0


class KvServer:
    """Serves one worker's leases on a port of its own."""

    def __init__(
        self,
        leases: LeaseStore,
        fingerprint: str,
        host: str,
        *,
        tls: MutualTls | None = None,
        threads: int = 8,
        more_handlers: Sequence[grpc.GenericRpcHandler] = (),
    ) -> None:
        self._leases = leases
        self._fingerprint = fingerprint
        self._host = host
        self._tls = tls
        self._server = grpc.server(
            futures.ThreadPoolExecutor(threads, thread_name_prefix="kv-serve"),
            handlers=[_Handler(self), *more_handlers],
            options=OPTIONS,
        )

    def start(self) -> str:
        """Listen on a free port. Returns `host:port`."""
        address = listen(self._server, self._host, self._tls)
        self._server.start()
        return address

    def stop(self) -> None:
        """Refuse new calls and end those under way."""
        self._server.stop(grace=0).wait()

    def pull(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream a lease's frames and the trailer."""
        query = msgpack.unpackb(message)
        if query["fingerprint"] != self._fingerprint:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, "kv: layouts differ")
        lease_id, start = query["lease_id"], query["start"]
        frames = self._leases.stream(lease_id, query["secret"], timeout_s=query["timeout_s"])
        sent = 0
        try:
            for frame in frames:
                part = from_token(frame, start)
                if part is not None:
                    sent += 1
                    yield encode(part, lease_id)
        except LeaseNotFound as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        yield encode(Trailer(sent), lease_id)

    def release(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Drop a lease. Idempotent."""
        query = msgpack.unpackb(message)
        return _packed(self._leases.release(query["lease_id"], query["secret"]))

    def drain(self, message: bytes, _context: grpc.ServicerContext) -> bytes:
        """Wait, at most the query's `timeout_s`, until every lease is gone; tell whether."""
        return _packed(self._leases.wait_empty(msgpack.unpackb(message)["timeout_s"]))

    def stats(self, _message: bytes, _context: grpc.ServicerContext) -> bytes:
        """The store's gauges."""
        return _packed(asdict(self._leases.gauges()))


class _Handler(grpc.GenericRpcHandler):
    def __init__(self, server: KvServer) -> None:
        self._server = server

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        if details.method == PULL:
            return grpc.unary_stream_rpc_method_handler(self._server.pull)
        unary = {
            RELEASE: self._server.release,
            DRAIN: self._server.drain,
            STATS: self._server.stats,
        }.get(details.method)
        return None if unary is None else grpc.unary_unary_rpc_method_handler(unary)


def _packed(value: object) -> bytes:
    packed: bytes = msgpack.packb(value)
    return packed


def from_token(frame: Frame, start: int) -> Frame | None:
    """The part of `frame` from token `start` on: the puller has the tokens before."""
    if frame.stop <= start:
        return None
    if frame.start >= start:
        return frame
    skipped = (start - frame.start) * (len(frame.payload) // (frame.stop - frame.start))
    return Frame(frame.layer, start, frame.stop, memoryview(frame.payload)[skipped:])


class KvClient:
    """Pulls leases from other workers; one channel per peer, kept open."""

    def __init__(self, tls: MutualTls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.Channel] = {}
        self._lock = threading.Lock()

    def pull(
        self, endpoint: str, ticket: dict[str, Any], fingerprint: str, start: int, timeout_s: float
    ) -> KvPull:
        """Begin to pull the tokens from `start` on. Iterate the result for the frames."""
        query = {
            "lease_id": ticket["lease_id"],
            "secret": ticket["secret"],
            "fingerprint": fingerprint,
            "start": start,
            "timeout_s": timeout_s,
        }
        stream: Any = self._channel(endpoint).unary_stream(PULL)
        return KvPull(stream(msgpack.packb(query), timeout=timeout_s), ticket["lease_id"])

    def close(self) -> None:
        """Close every channel; pulls under way fail."""
        with self._lock:
            for opened in self._channels.values():
                opened.close()
            self._channels.clear()

    def _channel(self, endpoint: str) -> grpc.Channel:
        with self._lock:
            if endpoint not in self._channels:
                self._channels[endpoint] = channel(endpoint, self._tls)
            return self._channels[endpoint]


class KvPull:
    """A stream of frames; `cancel()` from any thread ends it."""

    def __init__(self, call: Any, lease_id: str) -> None:
        self._call = call
        self._lease_id = lease_id

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames. Raises KvTransferError unless the stream came whole."""
        frames = 0
        try:
            for message in self._call:
                item = decode(message, self._lease_id)
                if isinstance(item, Trailer):
                    if item.frames != frames:
                        raise CorruptFrame(f"stream: {frames} of {item.frames} frames came")
                    return
                frames += 1
                yield item
        except grpc.RpcError as error:
            raise transfer_error(error) from error
        raise CorruptFrame("stream: ended without a trailer")

    def cancel(self) -> None:
        """End the stream; the peer stops sending."""
        self._call.cancel()


def transfer_error(error: grpc.RpcError) -> KvTransferError:
    """What a failed call means for the pull."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return LeaseNotFound(error.details())
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return LayoutMismatch(error.details())
    return KvTransferError(f"{error.code().name}: {error.details()}")


class KvPeers:
    """Talks to prefill workers' KV ports from an asyncio program; one channel per peer."""

    def __init__(self, tls: MutualTls | None = None) -> None:
        self._tls = tls
        self._channels: dict[str, grpc.aio.Channel] = {}

    async def release(self, ticket: Ticket) -> None:
        """Drop the lease at every rank. A peer that is gone holds nothing: not an error."""
        query = {"lease_id": ticket.lease_id, "secret": ticket.secret}
        await asyncio.gather(
            *(
                self._call(peer, RELEASE, query, _CALL_TIMEOUT_S, if_gone=False)
                for peer in ticket.endpoints
            )
        )

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

    async def _call(
        self, peer: str, method: str, query: dict[str, Any], timeout_s: float, *, if_gone: Any
    ) -> Any:
        if peer not in self._channels:
            self._channels[peer] = aio_channel(peer, self._tls)
        call: Any = self._channels[peer].unary_unary(method)
        try:
            return msgpack.unpackb(await call(msgpack.packb(query), timeout=timeout_s))
        except grpc.aio.AioRpcError:
            return if_gone
