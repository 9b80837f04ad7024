"""A worker's end of its keeper: shared memory, and requests to the other process."""

from __future__ import annotations

import logging
import os
import queue
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import astuple
from multiprocessing.connection import Connection
from typing import Any

import msgpack

from ..core.errors import InvalidConfiguration, KvTransferError
from .keeper import KeeperConfig, Piece, pack_config
from .nixl.agent import NixlAgent, NixlMemory
from .nixl.arena import Arena, Bytes
from .nixl.reads import ReadProgress
from .object_ref.shared_memory import SharedMemory

logger = logging.getLogger("vllm.specprefill.handoff")

KEEPER = "specprefill.kv.keeper"
_START_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 5.0


class KeeperLink:
    """Starts a keeper. Requests go out in order, from a thread of their own: none of them waits."""

    def __init__(
        self,
        *,
        max_bytes: int,
        carrier: str,
        host: str,
        tls: dict[str, Any] | None,
        lease_s: float,
        fingerprint: str,
        device: tuple[NixlAgent, NixlMemory] | None = None,
    ) -> None:
        """With `device`, memory of `max_bytes` that the agent has registered, KV lies there.

        Raises InvalidConfiguration or KvTransferError when the keeper cannot serve."""
        self._shared = SharedMemory(max_bytes)
        self._arena = Arena(max_bytes, self._shared.memory)
        self._lock = threading.Lock()
        self._regions: dict[int, memoryview] = {}  # by offset: what the keeper still refers to
        self._gone = threading.Event()
        self._progress = None if device is None else ReadProgress(device[0])
        self._advancing = ExitStack()
        self._readers = 0
        config = KeeperConfig(
            self._shared.region.descriptor,
            max_bytes,
            carrier,
            host,
            tls,
            lease_s,
            fingerprint,
            None if device is None else _introduction(*device),
        )
        self._link = _start_keeper(config)
        self.address, self.carrier, self.pid = self._await_ready()
        self._outbox: queue.SimpleQueue[tuple[bytes, Callable[[], None] | None] | None] = (
            queue.SimpleQueue()
        )
        self._threads = [
            threading.Thread(target=work, name=f"kv-keeper-{name}", daemon=True)
            for name, work in (("out", self._send_all), ("in", self._receive_all))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def memory(self) -> Bytes:
        """All of the shared memory, to page-lock."""
        return self._shared.memory

    def check(self) -> None:
        """Raise KvTransferError when the keeper is dead: no ticket of this worker can be pulled."""
        if self._gone.is_set():
            raise KvTransferError("kv keeper: its process ended")

    def take(self, size: int) -> tuple[int, memoryview] | None:
        """Return room for a piece, and its offset; None when the memory is full."""
        view = self._arena.take(size)
        if view is None:
            return None
        offset = self._arena.offset_of(view)
        assert offset is not None
        with self._lock:
            self._regions[offset] = view
        return offset, view

    def append(self, piece: Piece, copied: Callable[[], None]) -> None:
        """Add a piece to its lease once `copied` has returned: then its bytes are in place.

        When `copied` raises, the lease ends.
        """
        self._outbox.put((msgpack.packb(["append", *astuple(piece)]), copied))

    def ask(self, verb: str, *values: str | int) -> None:
        """Queue a request: open, complete, announce, issue, release or drop."""
        self._outbox.put((msgpack.packb([verb, *values]), None))

    def close(self) -> None:
        """Hang up; the keeper ends with all that it holds. Idempotent."""
        self._outbox.put(None)
        self._threads[0].join(_STOP_TIMEOUT_S)
        if not self._link.closed:
            with socket.socket(fileno=os.dup(self._link.fileno())) as link:
                link.shutdown(socket.SHUT_RDWR)  # closing alone would not wake who reads from it
            self._link.close()

    def _await_ready(self) -> tuple[str, str, int]:
        try:
            if not self._link.poll(_START_TIMEOUT_S):
                raise KvTransferError(f"kv keeper: not ready within {_START_TIMEOUT_S:g} s")
            verb, *values = msgpack.unpackb(self._link.recv_bytes())
        except EOFError as error:
            raise KvTransferError("kv keeper: its process ended at its start") from error
        if verb == "failed":
            raise InvalidConfiguration(*values)
        address, carrier, pid = values
        return address, carrier, pid

    def _send_all(self) -> None:
        while (item := self._outbox.get()) is not None:
            message, copied = item
            try:
                if copied is not None:
                    copied()
            except Exception:  # the boundary of a thread: the lease it belongs to fails
                piece = Piece(*msgpack.unpackb(message)[1:])
                logger.exception("kv staging failed: lease=%s", piece.lease_id)
                self._free([piece.offset])
                message = msgpack.packb(["drop", piece.lease_id])
            try:
                self._link.send_bytes(message)
            except OSError:  # the keeper is gone: `check` raises in the engine
                self._gone.set()
                return

    def _receive_all(self) -> None:
        while True:
            try:
                verb, value = msgpack.unpackb(self._link.recv_bytes())
            except (EOFError, OSError):
                self._gone.set()
                return
            if verb == "freed":
                self._free(value)
            else:
                self._serve_readers(value)

    def _serve_readers(self, readers: int) -> None:
        """Advance the agent while anybody reads from this process's device memory."""
        if self._progress is not None:
            if readers and not self._readers:
                self._advancing.enter_context(self._progress)
            elif self._readers and not readers:
                self._advancing.close()
        self._readers = readers

    def _free(self, offsets: list[int]) -> None:
        with self._lock:
            for offset in offsets:
                self._regions.pop(offset, None)


def _introduction(agent: NixlAgent, memory: NixlMemory) -> tuple[str, bytes, int, int | None]:
    return agent.name, agent.metadata(), memory.address, memory.device


def _start_keeper(config: KeeperConfig) -> Connection:
    """Start a keeper, which leaves this process's tree at once; it ends when the link does."""
    ours, theirs = socket.socketpair()
    with theirs:
        subprocess.run(
            # The last argument names the worker, for `ps`.
            [sys.executable, "-m", KEEPER, str(theirs.fileno()), str(os.getpid())],
            pass_fds=(theirs.fileno(), config.memory_fd),
            stdin=subprocess.DEVNULL,
            check=False,  # what went wrong shows on the link
        )
    link = Connection(ours.detach())
    try:
        link.send_bytes(pack_config(config))
    except OSError as error:
        raise KvTransferError("kv keeper: its process ended at its start") from error
    return link
