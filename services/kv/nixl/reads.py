"""The carrier `nixl`: the messages of the KV stream, read by the peer from registered memory.

`Read` is to `Pull` what a list of addresses is to the bytes: the same leases, secret, layout
and messages, but the stream has the place of each message, and the reader's own agent fetches
it. The first item introduces the server's agent; the last lies nowhere: it is the trailer.

The introduction opens all of the server's registered memory to the reader, so it is sent only
to readers that know a lease's secret; what a reader takes for a message must pass its digest.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Any

import grpc
import msgpack

from ...core.errors import CorruptFrame, KvTransferError, LeaseNotFound
from ...core.types import Ticket
from ..channels import Channels
from ..frames import Frame, Trailer, decode, encode
from ..leases import LeaseStore
from ..pull import transfer_error
from ..rpc import SERVICE, PullQuery, make_trailer, open_lending
from ..silence import messages_of, with_beats
from ..tls import TlsSource
from .agent import NixlAgent, NixlRead
from .arena import Arena, address_of
from .landing import LandingMemory

READ = f"/{SERVICE}/Read"
LANDING_BYTES = 64 << 20  # of all pulls of a worker: more than 25 at once read less ahead
AHEAD = 4  # reads under way per pull, where there is room
_POLL_S = 50e-6
_PROGRESS_S = 500e-6


@dataclass(frozen=True, slots=True)
class Introduction:
    """The agent whose memory the addresses are in."""

    agent: str
    metadata: bytes


@dataclass(frozen=True, slots=True)
class MessagePlace:
    """One message: its place, or its bytes if it is not in registered memory."""

    address: int
    size: int  # 0: it is `inline`
    inline: bytes = b""


def pack(item: Introduction | MessagePlace) -> bytes:
    """Pack the place as an item of the stream."""
    packed: bytes = msgpack.packb(astuple(item))
    return packed


def unpack(item: bytes) -> Introduction | MessagePlace:
    """Invert `pack`. Raises CorruptFrame."""
    try:
        fields = msgpack.unpackb(item)
    except (msgpack.UnpackException, ValueError) as error:
        raise CorruptFrame("read: an item is not msgpack") from error
    kinds = [type(field) for field in fields] if isinstance(fields, list) else []
    if kinds == [str, bytes]:
        return Introduction(*fields)
    if kinds == [int, int, bytes]:
        return MessagePlace(*fields)
    raise CorruptFrame("read: an item is neither an introduction nor a place")


def await_read(agent: NixlAgent, read: NixlRead, call: Any, timeout_s: float) -> None:
    """Return when the read has ended. Raises KvTransferError, also when `call` has."""
    give_up_s = time.monotonic() + timeout_s
    while not read.has_ended():
        if not call.is_active() or time.monotonic() > give_up_s:
            agent.abandon(read)
            raise KvTransferError(f"nixl: the peer hung up, or a read took {timeout_s:g} s")
        time.sleep(_POLL_S)


def take_last_room(
    landing: LandingMemory, agent: NixlAgent, size: int, call: Any, timeout_s: float
) -> memoryview:
    """Wait for room for a pull that holds none. Raises KvTransferError, also when `call` ends."""

    def check() -> None:
        if not call.is_active():
            raise KvTransferError("nixl: the peer hung up")
        agent.sweep()  # nobody else may be advancing an abandoned read

    return landing.wait(size, timeout_s, check)


class NixlHandler(grpc.GenericRpcHandler):
    """Serves a store's messages to readers; goes into a `KvServer`."""

    def __init__(
        self, leases: LeaseStore, fingerprint: str, agent: NixlAgent, arena: Arena
    ) -> None:
        self._leases = leases
        self._fingerprint = fingerprint
        self._agent = agent
        self._arena = arena  # registered with the agent
        self._progress = ReadProgress(agent)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.GenericRpcHandler."""
        if details.method != READ:
            return None
        return grpc.unary_stream_rpc_method_handler(self._read)

    def _read(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Stream the places; nothing that was sent moves until the reader hangs up."""
        query, gone = open_lending(message, self._fingerprint, context)
        lent: list[bytes | memoryview] = []
        with self._progress:
            try:
                yield from with_beats(self._items(query, lent))
            except LeaseNotFound as error:
                context.abort(grpc.StatusCode.NOT_FOUND, str(error))
            gone.wait()

    def _items(self, query: PullQuery, lent: list[bytes | memoryview]) -> Iterator[bytes | None]:
        """Yield the items; the agent is introduced only after the lease's secret proved right."""
        frames = self._leases.stream(query.lease_id, query.secret, timeout_s=query.timeout_s)
        for number, frame in enumerate(frames):
            if number == 0:
                yield pack(Introduction(self._agent.name, self._agent.metadata()))
            message = frame.from_token(query.start, query.lease_id)
            if message is None:
                yield None
                continue
            lent.append(message)
            yield pack(self._place(message))
        end = make_trailer(self._leases, query.lease_id, len(lent))
        yield pack(MessagePlace(0, 0, encode(end, query.lease_id)))

    def _place(self, message: bytes | memoryview) -> MessagePlace:
        if self._arena.holds(message):
            return MessagePlace(address_of(message), len(message))
        return MessagePlace(0, 0, bytes(message))


class ReadProgress:
    """Advances an agent while anybody reads from it, and costs nothing else."""

    def __init__(self, agent: NixlAgent) -> None:
        self._agent = agent
        self._readers = 0
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        with self._lock:
            self._readers += 1
            if self._readers == 1:
                threading.Thread(target=self._run, name="kv-progress", daemon=True).start()

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._readers -= 1

    def _run(self) -> None:
        while self._readers:
            self._agent.progress()
            time.sleep(_PROGRESS_S)


class NixlClient:
    """Reads leases of other workers; one control channel per peer, kept open."""

    def __init__(self, agent: NixlAgent, landing: Arena, tls: TlsSource | None = None) -> None:
        self._agent = agent
        self._landing = LandingMemory(landing)  # where all reads under way go
        self._channels = Channels(tls)

    def start(self) -> None:
        """Register the memory that reads go to."""
        self._agent.register(self._landing.arena)

    def pull(
        self, endpoint: str, ticket: Ticket, fingerprint: str, start: int, timeout_s: float
    ) -> NixlPull:
        """Start to read the tokens from `start` on. See `KvClient.pull`."""
        query = PullQuery(ticket.lease.id, ticket.lease.secret, fingerprint, start, timeout_s)
        stream = self._channels.stream(endpoint, READ, query.pack(), retry_s=timeout_s)
        return NixlPull(self._agent, self._landing, endpoint, stream, query)

    def close(self) -> None:
        """Close every channel; reads under way fail."""
        self._channels.close()


class NixlPull:
    """One lease being pulled: a few messages are read ahead of the one that is stored."""

    def __init__(
        self, agent: NixlAgent, landing: LandingMemory, endpoint: str, call: Any, query: PullQuery
    ) -> None:
        self._agent = agent
        self._landing = landing
        self._endpoint = endpoint
        self._call = call
        self._lease_id = query.lease_id
        self._silence_s = query.timeout_s
        self._reads: deque[NixlRead | bytes] = deque()  # a message that came inline is there

    def deliver_to(self, store: Callable[[Frame], None]) -> float:
        """See `KvPull.deliver_to`; `store` is called from this thread only."""
        frames = 0
        try:
            for item in self._messages():
                if isinstance(item, Trailer):
                    if item.frames != frames:
                        raise CorruptFrame(f"read: {frames} of {item.frames} frames came")
                    return item.complete_s
                frames += 1
                store(item)
                del item  # its room is free while the next one is waited for
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:  # its process is gone
                self._agent.forget(self._endpoint)
            raise transfer_error(error) from error
        finally:
            self._end()
        raise CorruptFrame("read: ended without a trailer")

    def cancel(self) -> None:
        """End the pull, from any thread."""
        self._call.cancel()

    def _messages(self) -> Iterator[Frame | Trailer]:
        """Yield every message, whole and in order."""
        peer = ""
        for item in map(unpack, messages_of(self._call, self._silence_s)):
            if isinstance(item, Introduction):
                self._agent.add_peer(self._endpoint, item.agent, item.metadata, self._call)
                peer = item.agent
                continue
            if not item.size:
                self._reads.append(item.inline)
                yield from self._landed(0)  # the trailer is inline: nothing is under way behind it
                continue
            while (into := self._landing.take(item.size)) is None and self._reads:
                yield from self._landed(len(self._reads) - 1)
            if into is None:
                into = self._wait_for_room(item.size)
            with self._agent.forget_on_error(self._endpoint):
                self._reads.append(self._agent.read(peer, item.address, into))
            del into  # the read has it
            yield from self._landed(AHEAD)

    def _wait_for_room(self, size: int) -> memoryview:
        return take_last_room(self._landing, self._agent, size, self._call, self._silence_s)

    def _landed(self, ahead: int) -> Iterator[Frame | Trailer]:
        """Yield the messages of the oldest reads, except the last `ahead` of them."""
        while len(self._reads) > ahead:
            yield decode(self._await_oldest(), self._lease_id)

    def _await_oldest(self) -> bytes | memoryview:
        read = self._reads.popleft()
        if isinstance(read, bytes):
            return read
        with self._agent.forget_on_error(self._endpoint):
            await_read(self._agent, read, self._call, self._silence_s)
        return read.payload

    def _end(self) -> None:
        """Hang up: the peer may have its memory back."""
        self._call.cancel()
        while self._reads:
            read = self._reads.popleft()
            if isinstance(read, NixlRead):
                self._agent.abandon(read)
