"""Pulls leases from other workers, over one or more gRPC streams at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from typing import Any

import grpc

from ..core.errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from ..core.types import Ticket
from .channels import Channels
from .frames import Frame, Trailer, decode
from .rpc import PULL, PullQuery
from .silence import messages_of
from .tls import TlsSource


class KvClient:
    """One connection per peer and stream, kept open."""

    def __init__(self, tls: TlsSource | None = None, *, streams: int = 1) -> None:
        self._streams = streams
        self._channels = Channels(tls)

    def pull(
        self, endpoint: str, ticket: Ticket, fingerprint: str, start: int, timeout_s: float
    ) -> KvPull:
        """Start to pull the tokens from `start` on; fail after `timeout_s` without a message."""
        return KvPull(
            [
                self._stream(
                    endpoint,
                    PullQuery(
                        ticket.lease.id,
                        ticket.lease.secret,
                        fingerprint,
                        start,
                        timeout_s,
                        part,
                        self._streams,
                    ),
                )
                for part in range(self._streams)
            ]
        )

    def close(self) -> None:
        """Close every channel; pulls under way fail."""
        self._channels.close()

    def _stream(self, endpoint: str, query: PullQuery) -> KvStream:
        call = self._channels.stream(
            endpoint, PULL, query.pack(), query.part, retry_s=query.timeout_s
        )
        return KvStream(call, query.lease_id, query.timeout_s)


class KvPull:
    """One lease being pulled over its streams. Each holds one frame here, and what gRPC's
    flow control lets the peer send ahead of it.
    """

    def __init__(self, streams: Sequence[KvStream]) -> None:
        self._streams = streams
        self._failures: list[Exception] = []  # the first is the cause of the others

    def deliver_to(self, store: Callable[[Frame], None]) -> float:
        """Give every frame to `store`, from one thread per stream.

        A layer comes over one stream, in token order. Returns the seconds for which the KV was
        complete at the peer when its last frame came. Raises KvTransferError unless every
        stream came whole; what `store` raises ends the pull, too.
        """
        first, *others = self._streams
        with futures.ThreadPoolExecutor(max(1, len(others)), "kv-stream") as threads:
            for stream in others:  # no thread is started without any
                threads.submit(self._read, stream, store)
            self._read(first, store)
        if self._failures:
            raise self._failures[0]
        return max(stream.complete_s for stream in self._streams)

    def cancel(self) -> None:
        """End the pull, from any thread; the peer stops sending."""
        for stream in self._streams:
            stream.cancel()

    def _read(self, stream: KvStream, store: Callable[[Frame], None]) -> None:
        try:
            for frame in stream:
                store(frame)
        except Exception as error:  # noqa: BLE001  # raised again by `deliver_to`
            self._failures.append(error)
            self.cancel()  # the other streams are of no use now


class KvStream:
    """Some layers' frames, in order; `cancel()` from any thread ends it."""

    def __init__(self, call: Any, lease_id: str, silence_s: float) -> None:
        self._call = call
        self._lease_id = lease_id
        self._silence_s = silence_s
        self.complete_s = math.inf  # of the trailer

    def __iter__(self) -> Iterator[Frame]:
        """Yield the frames. Raises KvTransferError unless the stream came whole."""
        frames = 0
        try:
            for message in messages_of(self._call, self._silence_s):
                item = decode(message, self._lease_id)
                if isinstance(item, Trailer):
                    if item.frames != frames:
                        raise CorruptFrame(f"stream: {frames} of {item.frames} frames came")
                    self.complete_s = item.complete_s
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
    """Return the error that a failed call means for the pull."""
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return LeaseNotFound(error.details())
    if error.code() is grpc.StatusCode.FAILED_PRECONDITION:
        return LayoutMismatch(error.details())
    return KvTransferError(f"{error.code().name}: {error.details()}")
