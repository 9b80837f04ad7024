"""Holds an engine worker's leases and serves them, in a process of its own.

KV travels while the engine computes. In the engine's own process, the Python threads that digest
and send it would share the interpreter's lock with the step loop. So the worker only copies KV
into memory that both processes map, without another copy there; everything else happens here:
`python -m specprefill.kv.keeper FD`.

The worker lays each piece out as `n` equal frames (the last may be shorter), each behind
`HEADER_ROOM` bytes; a frame is sealed in place, without a copy: its header ends where its
payload begins.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from ..config import KvTls
from ..core.errors import InvalidConfiguration
from .announcements import Announcement, Announcements
from .frames import HEADER_ROOM, Frame, SealedFrame, seal_in_place
from .leases import LeaseStore
from .nixl.agent import NixlAgent, agent_for
from .nixl.arena import Arena, Bytes
from .nixl.device_reads import DeviceIntroduction, DeviceReadHandler
from .nixl.reads import NixlHandler
from .object_ref.shared_memory import LocateHandler, SharedMemory
from .rpc import KvServer
from .tls import watch_tls

logger = logging.getLogger("specprefill.kv.keeper")

_SWEEP_S = 0.5


@dataclass(frozen=True, slots=True)
class KeeperConfig:
    """The first message to a keeper.

    With `device` (the agent's name, its metadata, and the device memory's address and GPU), the
    shared memory is a shadow: the worker puts the KV at the same offsets of device memory.
    """

    memory_fd: int
    memory_bytes: int
    carrier: str  # as in KvConfig
    host: str
    tls: dict[str, Any] | None  # a KvTls
    lease_s: float
    fingerprint: str
    # The worker's agent, if KV stays in device memory.
    device: tuple[str, bytes, int, int | None] | None


@dataclass(frozen=True, slots=True)
class Piece:
    """KV of tokens `[start, stop)` of one layer, as frames in the shared memory."""

    lease_id: str
    layer: int
    start: int
    stop: int
    offset: int  # of the region, which begins with the first frame's header room
    token_bytes: int
    frame_tokens: int
    last: bool  # of the lease

    @property
    def size(self) -> int:
        """Bytes of the region."""
        return piece_bytes(self.stop - self.start, self.token_bytes, self.frame_tokens)

    def frames(self, region: memoryview) -> Iterator[tuple[Frame, memoryview]]:
        """Yield each frame and the bytes before its payload, `HEADER_ROOM` of them."""
        place = 0
        for start in range(self.start, self.stop, self.frame_tokens):
            stop = min(start + self.frame_tokens, self.stop)
            first = place + HEADER_ROOM
            end = first + (stop - start) * self.token_bytes
            yield Frame(self.layer, start, stop, region[first:end]), region[place:end]
            place = end


def piece_bytes(tokens: int, token_bytes: int, frame_tokens: int) -> int:
    """Return the bytes of a piece of `tokens` tokens, header room included."""
    return tokens * token_bytes + -(-tokens // frame_tokens) * HEADER_ROOM


class Keeper:
    """Serves what the worker lays into the shared memory, until the worker hangs up."""

    def __init__(self, config: KeeperConfig, link: Connection) -> None:
        """Listen. Raises InvalidConfiguration."""
        self._link = link
        self._sending = threading.Lock()
        shared = SharedMemory(config.memory_bytes, config.memory_fd)
        self._memory: Bytes = shared.memory
        self._leases = LeaseStore(
            max_bytes=config.memory_bytes, lease_s=config.lease_s, now=time.monotonic
        )
        self._announcements = Announcements()
        self._fingerprint = config.fingerprint
        self._in_device = config.device is not None
        self._freed: queue.SimpleQueue[int | None] = queue.SimpleQueue()  # offsets of regions
        tls = watch_tls(None if config.tls is None else KvTls(**config.tls))
        in_worker = config.device is not None
        nixl = None if in_worker else agent_for(config.carrier, encrypted=tls is not None)
        self._carrier = "nixl" if in_worker or nixl is not None else "grpc"
        self._server = KvServer(
            self._leases,
            self._announcements,
            config.fingerprint,
            config.host,
            tls=tls,
            sends_bytes=not in_worker,
            more_handlers=self._memory_handlers(config, shared, nixl),
        )
        self._address = self._server.start()

    def run(self) -> None:
        """Do what the worker asks until it hangs up or dies."""
        for work in (self._sweep, self._report_freed):
            threading.Thread(target=work, daemon=True).start()
        self._send("ready", self._address, self._carrier, os.getpid())
        while True:
            try:
                verb, *values = msgpack.unpackb(self._link.recv_bytes())
            except (EOFError, OSError):  # the worker has closed, or is gone
                return
            self._handle_request(verb, values)

    def _handle_request(self, verb: str, values: list[Any]) -> None:
        match verb:
            case "open":
                self._leases.open(*values)
            case "append":
                self._append(Piece(*values))
            case "complete":
                self._leases.complete(*values)
            case "announce":
                lease_id, tokens = values
                self._announcements.announce(Announcement(lease_id, tokens, self._fingerprint))
            case "issue":
                self._leases.issue(*values)
            case "release":
                self._leases.release(*values)
            case "drop":
                self._leases.drop(*values)
            case _:
                raise ValueError(f"unknown verb {verb!r}")

    def _append(self, piece: Piece) -> None:
        """Seal a piece's frames. Where that fails the lease ends: its reader need not wait."""
        region = self._region(piece)
        try:
            for frame, room in piece.frames(region):
                sealed = SealedFrame(
                    frame.layer,
                    frame.start,
                    frame.stop,
                    self._message(frame, piece.lease_id, room),
                )
                last = piece.last and frame.stop == piece.stop
                self._leases.append(piece.lease_id, sealed, last=last)
        except Exception:  # the boundary of the loop: the other leases live on
            logger.exception("kv piece refused: lease=%s", piece.lease_id)
            self._leases.drop(piece.lease_id)

    def _message(self, frame: Frame, lease_id: str, room: memoryview) -> bytes | memoryview:
        """Return the message for a reader: sealed, or the payload's shadow."""
        return frame.payload if self._in_device else seal_in_place(frame, lease_id, room)

    def _region(self, piece: Piece) -> memoryview:
        """Return a piece's bytes; the worker may reuse them once nothing here refers to them."""
        array = self._memory[piece.offset : piece.offset + piece.size]
        weakref.finalize(array, self._freed.put, piece.offset).atexit = False
        return array.data

    def _memory_handlers(
        self, config: KeeperConfig, shared: SharedMemory, nixl: NixlAgent | None
    ) -> list[NixlHandler | LocateHandler | DeviceReadHandler]:
        """Let others read the memory itself: peers with NIXL, or this node's processes."""
        if config.device is not None:
            name, metadata, address, index = config.device
            return [
                DeviceReadHandler(
                    self._leases,
                    config.fingerprint,
                    DeviceIntroduction(name, metadata, index),
                    Arena(config.memory_bytes, shared.memory),
                    address,
                    lambda readers: self._send("readers", readers),
                )
            ]
        if nixl is not None:
            arena = Arena(config.memory_bytes, shared.memory)
            nixl.register(arena)
            return [NixlHandler(self._leases, config.fingerprint, nixl, arena)]
        if config.carrier == "object_ref":
            return [LocateHandler(self._leases, config.fingerprint, shared)]
        return []

    def _sweep(self) -> None:
        while True:
            time.sleep(_SWEEP_S)
            expired = self._leases.sweep()
            if expired:
                logger.warning("leases expired unpulled: count=%d", expired)

    def _report_freed(self) -> None:
        while (offset := self._freed.get()) is not None:
            offsets = [offset]
            while not self._freed.empty() and len(offsets) < 1024:
                more = self._freed.get()
                if more is not None:
                    offsets.append(more)
            try:
                self._send("freed", offsets)
            except OSError:  # the worker is gone, and so will be this process
                return

    def _send(self, *message: Any) -> None:
        with self._sending:
            self._link.send_bytes(msgpack.packb(message))


def main() -> None:
    """Serve the worker at the other end of the descriptor that the argument names.

    In a process that is nobody's child: vLLM kills an engine's tree of processes one by one, and
    stops at one that has ended by itself, as a keeper does when its worker is gone.
    """
    if os.fork():
        os._exit(0)
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s"
    )
    os.sched_setaffinity(0, range(os.cpu_count() or 1))  # not only the worker's compute core
    link = Connection(int(sys.argv[1]))
    try:
        keeper = Keeper(KeeperConfig(**msgpack.unpackb(link.recv_bytes())), link)
    except (InvalidConfiguration, OSError, RuntimeError) as error:
        link.send_bytes(msgpack.packb(["failed", str(error)]))
        return
    keeper.run()
    sys.stderr.flush()
    os._exit(0)  # threads of gRPC may still serve: nothing that they serve is valid any more


def pack_config(config: KeeperConfig) -> bytes:
    """Pack the first message."""
    message: bytes = msgpack.packb(asdict(config))
    return message


if __name__ == "__main__":
    main()
