"""KV that stays in device memory: read by the peer's agent from the prefill worker's device.

`ReadDevice` is to `Read` what device memory is to host memory: the same leases, secret and
layout, but no message: the stream gives each frame's place and address, and the reader's agent
fetches its payload into device memory of its own. Nothing crosses the host, so there is no
digest; the transport's own checks are all there is.

The keeper answers the readers. It knows device memory by its shadow: host memory of the same size
that nobody touches (so it costs nothing), in which frames have the offsets of the real ones.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from typing import Any

import grpc
import msgpack

from ...core.errors import CorruptFrame, LeaseNotFound
from ...core.types import Ticket
from ..channels import Channels
from ..frames import Frame, Trailer, decode, encode
from ..leases import LeaseStore
from ..pull import transfer_error
from ..rpc import SERVICE, PullQuery, make_trailer, open_lending
from ..silence import messages_of, with_beats
from ..tls import TlsSource
from .agent import NixlAgent, NixlMemory, NixlRead
from .arena import Arena
from .landing import LandingMemory
from .reads import AHEAD, await_read, take_last_room

READ_DEVICE = f"/{SERVICE}/ReadDevice"


@dataclass(frozen=True, slots=True)
class DeviceIntroduction:
    """The agent whose memory the addresses are in, and the index of its GPU where it runs."""

    agent: str
    metadata: bytes
    device: int | None  # None: the host's memory


@dataclass(frozen=True, slots=True)
class DeviceFrame:
    """A frame's place in the prompt, and where its payload lies."""

    layer: int
    start: int
    stop: int
    address: int
    size: int


Item = DeviceIntroduction | DeviceFrame | bytes  # of the stream; bytes: its trailer
_KINDS: tuple[type, ...] = (DeviceIntroduction, DeviceFrame)
_TRAILER = len(_KINDS)


def pack_item(item: Item) -> bytes:
    """Pack an item as a message of the stream."""
    if isinstance(item, bytes):
        packed: bytes = msgpack.packb([_TRAILER, item])
    else:
        packed = msgpack.packb([_KINDS.index(type(item)), *astuple(item)])
    return packed


def unpack_item(message: bytes) -> Item:
    """Invert `pack_item`. Raises CorruptFrame."""
    try:
        kind, *fields = msgpack.unpackb(message)
        types = [type(field) for field in fields]
        if kind == 0 and types in ([str, bytes, int], [str, bytes, type(None)]):
            return DeviceIntroduction(*fields)
        if kind == 1 and types == [int] * 5:
            return DeviceFrame(*fields)
        if kind == _TRAILER and types == [bytes]:
            return bytes(fields[0])
    except (msgpack.UnpackException, TypeError, ValueError) as error:
        raise CorruptFrame("read: an item is not msgpack") from error
    raise CorruptFrame("read: an item is of no known kind")


class DeviceReadHandler(grpc.GenericRpcHandler):
    """Sends readers the places of a store's frames in the worker's device memory."""

    def __init__(
        self,
        leases: LeaseStore,
        fingerprint: str,
        introduction: DeviceIntroduction,
        shadow: Arena,
        address: int,
        on_readers: Callable[[int], None],
    ) -> None:
        """`address` is the device memory's; `on_readers` receives the number of readers."""
        self._leases = leases
        self._fingerprint = fingerprint
        self._introduction = introduction
        self._shadow = shadow
        self._address = address
        self._on_readers = on_readers
        self._readers = 0
        self._lock = threading.Lock()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.GenericRpcHandler."""
        if details.method != READ_DEVICE:
            return None
        return grpc.unary_stream_rpc_method_handler(self._read)

    def _read(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream the places; nothing that was sent moves until the reader hangs up."""
        query, gone = open_lending(message, self._fingerprint, context)
        lent: list[bytes | memoryview] = []
        self._count(1)
        try:
            yield from with_beats(self._items(query, lent))
            gone.wait()
        except LeaseNotFound as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        finally:
            self._count(-1)

    def _items(self, query: PullQuery, lent: list[bytes | memoryview]) -> Iterator[bytes | None]:
        frames = self._leases.stream(query.lease_id, query.secret, timeout_s=query.timeout_s)
        for number, frame in enumerate(frames):
            if number == 0:
                yield pack_item(self._introduction)
            if frame.stop <= query.start:
                yield None
                continue
            offset = self._shadow.offset_of(frame.message)
            if offset is None:
                raise LeaseNotFound(f"lease {query.lease_id}: not in device memory")
            lent.append(frame.message)
            place = (frame.layer, frame.start, frame.stop)
            item = DeviceFrame(*place, self._address + offset, len(frame.message))
            yield pack_item(item)
        end = make_trailer(self._leases, query.lease_id, len(lent))
        yield pack_item(encode(end, query.lease_id))

    def _count(self, change: int) -> None:
        with self._lock:
            self._readers += change
            self._on_readers(self._readers)


class DeviceClient:
    """Reads leases from other workers' device memory into this one's."""

    def __init__(
        self,
        agent: NixlAgent,
        landing: LandingMemory,
        memory: NixlMemory,
        tls: TlsSource | None = None,
    ) -> None:
        """`memory` is registered with the agent; `landing` is its shadow, of the same size."""
        self._agent = agent
        self._landing = landing
        self._memory = memory
        self._channels = Channels(tls)

    def pull(
        self, endpoint: str, ticket: Ticket, fingerprint: str, start: int, timeout_s: float
    ) -> DevicePull:
        """Start to read the tokens from `start` on. See `KvClient.pull`."""
        query = PullQuery(ticket.lease.id, ticket.lease.secret, fingerprint, start, timeout_s)
        stream = self._channels.stream(endpoint, READ_DEVICE, query.pack(), retry_s=timeout_s)
        return DevicePull(self._agent, self._landing, self._memory, endpoint, stream, query)

    def close(self) -> None:
        """Close every channel; reads under way fail."""
        self._channels.close()


class DevicePull:
    """One lease being pulled. A frame's payload is the shadow of the bytes that have landed."""

    def __init__(
        self,
        agent: NixlAgent,
        landing: LandingMemory,
        memory: NixlMemory,
        endpoint: str,
        call: Any,
        query: PullQuery,
    ) -> None:
        self._agent = agent
        self._landing = landing
        self._memory = memory
        self._endpoint = endpoint
        self._call = call
        self._lease_id = query.lease_id
        self._silence_s = query.timeout_s
        self._peer = DeviceIntroduction("", b"", None)
        self._reads: deque[tuple[DeviceFrame, NixlRead]] = deque()

    def deliver_to(self, store: Callable[[Frame], None]) -> float:
        """See `KvPull.deliver_to`; the payload's place is free again once nothing refers to it."""
        frames = 0
        try:
            for item in map(unpack_item, messages_of(self._call, self._silence_s)):
                if isinstance(item, DeviceIntroduction):
                    self._agent.add_peer(self._endpoint, item.agent, item.metadata, self._call)
                    self._peer = item
                elif isinstance(item, DeviceFrame):
                    frames += 1
                    self._begin(item, store)
                    self._store_landed(store, AHEAD)
                else:
                    self._store_landed(store, 0)
                    return self._complete_s(item, frames)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                self._agent.forget(self._endpoint)
            raise transfer_error(error) from error
        finally:
            self._end()
        raise CorruptFrame("read: ended without a trailer")

    def cancel(self) -> None:
        """End the pull, from any thread."""
        self._call.cancel()

    def _complete_s(self, message: bytes, frames: int) -> float:
        """Check the trailer; return the seconds since the KV was complete."""
        end = decode(message, self._lease_id)
        if not isinstance(end, Trailer) or end.frames != frames:
            raise CorruptFrame(f"read: the stream ended after {frames} frames")
        return end.complete_s

    def _begin(self, frame: DeviceFrame, store: Callable[[Frame], None]) -> None:
        """Start the frame's read; where there is no room, store what was read before."""
        while (into := self._landing.take(frame.size)) is None and self._reads:
            self._store_landed(store, len(self._reads) - 1)
        if into is None:
            into = take_last_room(
                self._landing, self._agent, frame.size, self._call, self._silence_s
            )
        offset = self._landing.arena.offset_of(into)
        assert offset is not None
        remote = NixlMemory(frame.address, frame.size, self._peer.device)
        local = self._memory.part(offset, frame.size)
        with self._agent.forget_on_error(self._endpoint):
            read = self._agent.read_memory(self._peer.agent, remote, local, into)
        self._reads.append((frame, read))

    def _store_landed(self, store: Callable[[Frame], None], ahead: int) -> None:
        """Store the oldest reads, except the last `ahead` of them."""
        while len(self._reads) > ahead:
            store(self._await_oldest())

    def _await_oldest(self) -> Frame:
        frame, read = self._reads.popleft()
        with self._agent.forget_on_error(self._endpoint):
            await_read(self._agent, read, self._call, self._silence_s)
        return Frame(frame.layer, frame.start, frame.stop, read.payload)

    def _end(self) -> None:
        """Hang up: the peer may have its memory back."""
        self._call.cancel()
        while self._reads:
            self._agent.abandon(self._reads.popleft()[1])
