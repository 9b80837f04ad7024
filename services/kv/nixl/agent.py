"""The library NIXL: one-sided reads of another process's registered memory.

Over RDMA where there is any, else over shared memory or TCP, on hosts with and without GPUs.
Its agent has no thread of its own here, because that would never sleep: whoever waits for a
read advances it, and a side that is read from has to call `progress`.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ...core.errors import InvalidConfiguration, KvTransferError
from ..recent import MOST, Call, Recent
from .arena import Arena, address_of

logger = logging.getLogger(__name__)

_BACKEND = "UCX"
_WITHOUT = "allowed without it: auto, grpc, object_ref"


def agent_for(carrier: str, *, encrypted: bool) -> NixlAgent | None:
    """Start and return this process's agent; None where `kv.carrier` leaves the KV to gRPC.

    `auto` means NIXL wherever it works, unless the channel is to be encrypted: NIXL's reads
    are not. Raises InvalidConfiguration if the carrier is `nixl` and it does not work here.
    """
    if carrier == "nixl":
        return _start_agent()
    if carrier != "auto" or encrypted:
        return None
    try:
        return _start_agent()
    except InvalidConfiguration as error:
        logger.info("gRPC carries the KV: %s", error)
        return None


def require(carrier: str) -> None:
    """Raise InvalidConfiguration if the carrier is `nixl` and it is not installed here."""
    if carrier == "nixl" and importlib.util.find_spec("nixl") is None:
        raise InvalidConfiguration(
            "kv.carrier: nixl is not installed here (pip install 'specprefill[nixl]'); " + _WITHOUT
        )


def _start_agent() -> NixlAgent:
    agent = NixlAgent(f"specprefill-{os.getpid()}-{uuid.uuid4().hex}")
    agent.start()
    return agent


@dataclass(frozen=True, slots=True)
class NixlMemory:
    """Memory of this process that an agent reads into or is read from."""

    address: int
    size: int
    device: int | None = None  # a GPU's index; None: the host's

    @property
    def kind(self) -> str:
        """NIXL's name of the memory's kind."""
        return "DRAM" if self.device is None else "VRAM"

    @property
    def descriptor(self) -> tuple[int, int, int]:
        """NIXL's description of the memory."""
        return self.address, self.size, self.device or 0

    def part(self, offset: int, size: int) -> NixlMemory:
        """Return `size` bytes of the memory from `offset` on."""
        return replace(self, address=self.address + offset, size=size)


class NixlAgent:
    """One process's end of NIXL. Thread-safe."""

    def __init__(self, name: str, most_peers: int = MOST) -> None:
        self._name = name  # never used twice: a restarted peer is another agent
        self._lock = threading.Lock()
        self._peers: Recent[str, str] = Recent(most_peers)  # endpoint -> agent name
        self._lost: list[NixlRead] = []

    def start(self) -> None:
        """Load the library and its transports. Raises InvalidConfiguration if it cannot."""
        try:
            from nixl._api import nixl_agent, nixl_agent_config, nixl_thread_sync_t, nixlBind
        except ImportError as error:
            raise InvalidConfiguration(
                f"kv.carrier: nixl cannot be imported here ({error}); {_WITHOUT}"
            ) from error
        logging.getLogger("nixl").setLevel(logging.WARNING)
        self._errors = (
            nixlBind.nixlBackendError,
            nixlBind.nixlCancelledError,
            nixlBind.nixlInvalidParamError,
            nixlBind.nixlMismatchError,
            nixlBind.nixlNotAllowedError,
            nixlBind.nixlNotFoundError,
            nixlBind.nixlRemoteDisconnectError,
            nixlBind.nixlUnknownError,
        )
        config = nixl_agent_config(
            enable_prog_thread=False,
            backends=[_BACKEND],
            sync_mode=nixl_thread_sync_t.NIXL_THREAD_SYNC_STRICT,
        )
        try:
            self._agent: Any = nixl_agent(self._name, config)
        except (*self._errors, RuntimeError) as error:
            raise InvalidConfiguration(
                f"kv.carrier: nixl does not work here ({error}); {_WITHOUT}"
            ) from error
        if _BACKEND not in self._agent.backends:
            raise InvalidConfiguration(
                f"kv.carrier: nixl has no {_BACKEND} transport here; {_WITHOUT}"
            )

    @property
    def name(self) -> str:
        """A name that no other process has, nor this one after a restart."""
        return self._name

    @property
    def transports(self) -> tuple[str, ...]:
        """The transports that the agent uses. Known once started."""
        return tuple(self._agent.backends)

    @property
    def plugins(self) -> tuple[str, ...]:
        """The plug-ins that are installed here. Known once started."""
        return tuple(self._agent.get_plugin_list())

    def register(self, arena: Arena) -> None:
        """Register `arena` for peers who know an address in it, and for reads into it."""
        memory = arena.memory
        self.register_memory(NixlMemory(address_of(memory), memory.nbytes))

    def register_memory(self, memory: NixlMemory) -> None:
        """Register memory of either kind likewise. Raises KvTransferError."""
        with self._mapped_errors():
            self._agent.register_memory([(*memory.descriptor, "")], memory.kind)

    def metadata(self) -> bytes:
        """Return the metadata that a peer needs to read from the memory registered so far."""
        metadata: bytes = self._agent.get_agent_metadata()
        return metadata

    def add_peer(self, endpoint: str, name: str, metadata: bytes, call: Call) -> None:
        """Get to know the agent `name` that answers at `endpoint` now, once.

        It is kept as `Recent` does: reads belong to the `call` that introduced it.
        """
        with self._lock, self._mapped_errors():
            known = self._peers.get(endpoint)
            if known not in (None, name):  # its process has died and another one answers
                self._forget(endpoint)
            if name not in self._peers.values():
                self._agent.add_remote_agent(metadata)
            self._peers.use(endpoint, name, call)
            for unused in self._peers.take_unused():
                self._remove(unused)

    def forget(self, endpoint: str) -> None:
        """Forget the agent at `endpoint`, which is dead or another one. Idempotent."""
        with self._lock, self._mapped_errors():
            if self._peers.get(endpoint) is not None:
                self._forget(endpoint)

    @contextmanager
    def forget_on_error(self, endpoint: str) -> Iterator[None]:
        """Forget a peer whose memory cannot be read: the next pull meets it anew."""
        try:
            yield
        except KvTransferError:
            self.forget(endpoint)
            raise

    def read(self, peer: str, address: int, into: memoryview) -> NixlRead:
        """Start to read `len(into)` bytes at `address` of the agent `peer`."""
        local = NixlMemory(address_of(into), len(into))
        return self.read_memory(peer, replace(local, address=address), local, into)

    def read_memory(
        self, peer: str, remote: NixlMemory, local: NixlMemory, into: memoryview
    ) -> NixlRead:
        """Start to read `remote` of the agent `peer` into `local`, which `into` keeps in place."""
        self.sweep()
        with self._mapped_errors():
            handle = self._agent.initialize_xfer(
                "READ",
                self._agent.get_xfer_descs([local.descriptor], local.kind),
                self._agent.get_xfer_descs([remote.descriptor], remote.kind),
                peer,
            )
            self._agent.transfer(handle)
        return NixlRead(self, handle, into)

    def has_ended(self, handle: Any) -> bool:
        """Advance a read; True when its bytes are there. Raises KvTransferError if it failed."""
        with self._mapped_errors():
            state = self._agent.check_xfer_state(handle)
        if state == "ERR":
            raise KvTransferError("nixl: the read failed")
        return bool(state == "DONE")

    def release(self, handle: Any) -> None:
        """Forget a read that has ended."""
        with self._mapped_errors():
            self._agent.release_xfer_handle(handle)

    def abandon(self, read: NixlRead) -> None:
        """Abandon `read`; its memory stays taken until it has ended."""
        with self._lock:
            self._lost.append(read)
        self.sweep()

    def sweep(self) -> None:
        """Give back the memory of abandoned reads that have ended."""
        with self._lock:
            self._lost = [read for read in self._lost if not read.is_over()]

    def progress(self) -> None:
        """Answer peers who connect or read, as far as this process has to."""
        self._agent.get_new_notifs()

    def _forget(self, endpoint: str) -> None:
        self._remove(self._peers.pop(endpoint))

    def _remove(self, name: str) -> None:
        if name not in self._peers.values():
            self._agent.remove_remote_agent(name)

    @contextmanager
    def _mapped_errors(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            raise KvTransferError(f"nixl: {error}") from error


class NixlRead:
    """A read under way into `payload`, which it keeps in place until it has ended."""

    def __init__(self, agent: NixlAgent, handle: Any, payload: memoryview) -> None:
        self._agent = agent
        self._handle = handle
        self._payload = payload

    @property
    def payload(self) -> memoryview:
        """The bytes, once the read has ended."""
        return self._payload

    def has_ended(self) -> bool:
        """Advance the read; True, once, when the bytes are there. Raises KvTransferError."""
        ended = self._agent.has_ended(self._handle)
        if ended:
            self._agent.release(self._handle)
        return ended

    def is_over(self) -> bool:
        """Advance the read; True when its memory is no longer written to."""
        try:
            return self.has_ended()
        except KvTransferError:
            return True  # failed, so over
