"""Memory that another process of this machine can map: KV goes there without a socket.

`Locate` is to `Pull` what a map is to the bytes: the same leases, secret, layout and messages,
but the answer has each message's place in the worker's shared memory. Its receiver holds
the call open while it reads: until then no message moves. The messages' digests are checked
where they are used, so that wrong bytes are never taken for KV.
"""

from __future__ import annotations

import mmap
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import grpc
import msgpack
import numpy as np

from ...core.errors import LeaseNotFound
from ..frames import encode
from ..leases import LeaseStore
from ..nixl.arena import Arena, Bytes
from ..rpc import SERVICE, PullQuery, make_trailer, open_lending

LOCATE = f"/{SERVICE}/Locate"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True, slots=True)
class Region:
    """The place of a process's shared memory, and an identity to verify it by."""

    boot_id: str  # of the machine
    pid: int
    descriptor: int
    inode: int
    size: int


@dataclass(frozen=True, slots=True)
class MessagePlaces:
    """A lease's messages, in order: `(offset, size)` each, and the trailer itself."""

    region: Region
    places: list[tuple[int, int]]
    trailer: bytes

    def pack(self) -> bytes:
        """Pack the value as a message."""
        packed: bytes = msgpack.packb([astuple(self.region), self.places, self.trailer])
        return packed

    @classmethod
    def unpack(cls, message: bytes) -> MessagePlaces:
        """Invert `pack`."""
        region, places, end = msgpack.unpackb(message)
        return cls(Region(*region), [(offset, size) for offset, size in places], end)


class SharedMemory:
    """Memory of this process that has no name, and is gone with the last process that maps it."""

    def __init__(self, size: int, descriptor: int | None = None) -> None:
        """`descriptor` belongs to such memory of another process, inherited from it."""
        if descriptor is None:
            descriptor = os.memfd_create("specprefill-kv")
            os.ftruncate(descriptor, size)
        weakref.finalize(self, os.close, descriptor)
        self.memory: Bytes = np.frombuffer(mmap.mmap(descriptor, size), dtype=np.uint8)
        inode = os.fstat(descriptor).st_ino
        self.region = Region(_boot_id(), os.getpid(), descriptor, inode, size)


class Mappings:
    """Other processes' shared memory, each mapped once. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mapped: dict[str, tuple[Region, Bytes]] = {}

    def view(self, peer: str, region: Region) -> Bytes | None:
        """Return `peer`'s memory, read-only; None where this process cannot reach it."""
        with self._lock:
            known = self._mapped.get(peer)
            if known is not None and known[0] == region:
                return known[1]
            memory = _map_region(region)
            if memory is not None:
                self._mapped[peer] = region, memory
            return memory


class LocateHandler(grpc.GenericRpcHandler):
    """Returns the places of a store's messages; goes into a `KvServer`."""

    def __init__(self, leases: LeaseStore, fingerprint: str, shared: SharedMemory) -> None:
        self.arena = Arena(shared.region.size, shared.memory)
        self._leases = leases
        self._fingerprint = fingerprint
        self._shared = shared

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        """See grpc.GenericRpcHandler."""
        if details.method != LOCATE:
            return None
        return grpc.unary_stream_rpc_method_handler(self._locate)

    def _locate(self, message: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        """Yield one item, once the lease is complete; none if a message found no room."""
        query, gone = open_lending(message, self._fingerprint, context)
        lent: list[bytes | memoryview] = []
        try:
            located = self._locate_frames(query, lent)
        except LeaseNotFound as error:
            context.abort(grpc.StatusCode.NOT_FOUND, str(error))
        if located is not None:
            yield located.pack()
            gone.wait()

    def _locate_frames(
        self, query: PullQuery, lent: list[bytes | memoryview]
    ) -> MessagePlaces | None:
        """Look frames up as they come, so that little is left to do after the last one."""
        places: list[tuple[int, int]] = []
        frames = self._leases.stream(query.lease_id, query.secret, timeout_s=query.timeout_s)
        with closing(frames):
            for frame in frames:
                offset = self.arena.offset_of(frame.message)
                if offset is None:
                    return None
                places.append((offset, len(frame.message)))
                lent.append(frame.message)
        end = encode(make_trailer(self._leases, query.lease_id, len(lent)), query.lease_id)
        return MessagePlaces(self._shared.region, places, end)


def _map_region(region: Region) -> Bytes | None:
    """Map the region through the other process's own descriptor, if this is its machine."""
    if region.boot_id != _boot_id():
        return None
    try:
        descriptor = os.open(f"/proc/{region.pid}/fd/{region.descriptor}", os.O_RDONLY)
    except OSError:  # another namespace of processes, or another user
        return None
    try:
        if os.fstat(descriptor).st_ino != region.inode:
            return None
        return np.frombuffer(
            mmap.mmap(descriptor, region.size, prot=mmap.PROT_READ), dtype=np.uint8
        )
    finally:
        os.close(descriptor)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
