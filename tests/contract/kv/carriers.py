"""Every way to carry KV, behind the same few verbs, over real ports of this machine."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import numpy as np

from specprefill.core.types import Lease, Ticket
from specprefill.kv.announcements import Announcements
from specprefill.kv.channels import listen
from specprefill.kv.frames import Frame, from_token, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.nixl.agent import NixlAgent, agent_for
from specprefill.kv.nixl.arena import Arena, address_of
from specprefill.kv.nixl.reads import (
    LANDING_BYTES,
    READ,
    Introduction,
    MessagePlace,
    NixlClient,
    NixlHandler,
    ReadProgress,
    pack,
)
from specprefill.kv.object_ref.shared_memory import LocateHandler, SharedMemory
from specprefill.kv.object_ref.stream import KvCollector, KvRelay, as_object
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import PULL, KvServer
from specprefill.kv.tls import MutualTls

FINGERPRINT = "layout"
LEASE, SECRET = "lease", "secret"
TICKET = Ticket(Lease(LEASE, SECRET), (), "", 0)
LAYERS, TOKENS, TOKEN_BYTES = 3, 67, 16  # the last chunk fills no block
CHUNKS = ((0, 40), (40, TOKENS))
PULL_TIMEOUT_S = 60.0


def payload(layer: int, start: int, stop: int) -> bytes:
    """Bytes that differ with layer, token, and place in the token."""
    tokens = np.arange(start, stop, dtype=np.uint8)[:, None]
    place = np.arange(TOKEN_BYTES, dtype=np.uint8)[None, :]
    return bytes(tokens * 3 + place * 5 + layer * 7)


class Clock:
    """The test's time, or the real one."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.monotonic() + self.ahead_s


@dataclass
class Carrier:
    """A prefill worker and a decode worker with one carrier between them: here, gRPC."""

    tls: MutualTls | None = None
    clock: Clock = field(default_factory=Clock)
    port: int = 0

    def start(self) -> None:
        self.client = self.make_client()
        self.serve()

    def serve(self) -> None:
        """A prefill worker begins to listen: as new, but at the port of the one before."""
        self.leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=self.clock)
        self.server = KvServer(
            self.leases,
            Announcements(),
            FINGERPRINT,
            "127.0.0.1",
            port=self.port,
            tls=self.tls,
            more_handlers=self.handlers(),
        )
        self.address = self.server.start()
        self.port = int(self.address.rpartition(":")[2])

    def restart(self) -> None:
        """The prefill worker dies, and another one answers at its address."""
        self.server.stop()
        self.serve()

    def stop(self) -> None:
        self.client.close()
        self.server.stop()

    def make_client(self) -> Any:
        return KvClient(self.tls)

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        return []

    def sealed(self, frame: Frame) -> Any:
        return seal(frame, LEASE)

    def stage(self, *chunks: tuple[int, int], lease: str = LEASE) -> None:
        """The prefill worker computes these tokens."""
        self.leases.open(lease, SECRET)
        for start, stop in chunks:
            for layer in range(LAYERS):
                frame = Frame(layer, start, stop, payload(layer, start, stop))
                last = (stop, layer) == (TOKENS, LAYERS - 1)
                self.leases.append(lease, self.sealed(frame), last=last)

    def begin(self, ticket: Ticket = TICKET, fingerprint: str = FINGERPRINT, start: int = 0) -> Any:
        """A pull under way, as the decode worker starts it."""
        return self.client.pull(self.address, ticket, fingerprint, start, PULL_TIMEOUT_S)

    def pull(self, *, start: int = 0, **asked: Any) -> list[Frame]:
        """Everything that the decode worker takes, by layer."""
        return taken(self.begin(start=start, **asked).deliver_to, start)

    def pull_lies(self, messages: Sequence[bytes]) -> list[Frame]:
        """Pull from a peer that streams `messages`, whatever they are."""
        server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[self.liar(messages)])
        address = listen(server, "127.0.0.1", self.tls)
        server.start()
        try:
            return taken(
                self.client.pull(address, TICKET, FINGERPRINT, 0, PULL_TIMEOUT_S).deliver_to, 0
            )
        finally:
            server.stop(grace=0).wait()

    def liar(self, messages: Sequence[bytes]) -> grpc.GenericRpcHandler:
        return Liar(PULL, list(messages))

    def bytes_held(self) -> int:
        return self.leases.gauges().bytes_held


class Nixl(Carrier):
    """The decode worker's agent reads the prefill worker's memory."""

    astray = 0  # added to the addresses that a liar tells

    def start(self) -> None:
        self.reader = reader()
        super().start()

    def make_client(self) -> Any:
        client = NixlClient(self.reader, Arena(LANDING_BYTES), self.tls)
        client.start()
        return client

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        self.agent, self.arena = _agent(), Arena(1 << 20)
        self.agent.register(self.arena)
        return [NixlHandler(self.leases, FINGERPRINT, self.agent, self.arena)]

    def sealed(self, frame: Frame) -> Any:
        return seal(frame, LEASE, self.arena)

    def pull_lies(self, messages: Sequence[bytes]) -> list[Frame]:
        with ReadProgress(self.agent):
            return super().pull_lies(messages)

    def liar(self, messages: Sequence[bytes]) -> grpc.GenericRpcHandler:
        self.lent = [self.arena.hold([message]) for message in messages]
        places = [MessagePlace(address_of(held) + self.astray, len(held)) for held in self.lent]
        if places:  # a trailer always comes by itself
            places[-1] = MessagePlace(0, 0, bytes(messages[-1]))
        known = Introduction(self.agent.name, self.agent.metadata())
        return Liar(READ, [pack(item) for item in (known, *places)])

    def bytes_held(self) -> int:
        return self.leases.gauges().bytes_held + self.arena.bytes_used


class ObjectRef(Carrier):
    """The KV becomes an object, and is offered again beside the decode worker.

    The prefill worker is on another node: its messages come through the socket.
    """

    def start(self) -> None:
        self.collector = KvCollector(self.tls)
        self.relay = KvRelay("127.0.0.1", self.tls)
        self.relay.start()
        super().start()

    def stop(self) -> None:
        super().stop()
        self.collector.close()
        self.relay.stop()

    def pull(
        self, *, start: int = 0, ticket: Ticket = TICKET, fingerprint: str = FINGERPRINT
    ) -> list[Frame]:
        whole = replace(ticket, endpoints=(self.address,), fingerprint=fingerprint, tokens=TOKENS)
        with self.collector.collect(whole, 0, PULL_TIMEOUT_S) as kv:
            copied = [array.copy() for array in kv]  # as Ray's object store does
        return self._relayed(whole, copied, start)

    def pull_lies(self, messages: Sequence[bytes]) -> list[Frame]:
        kv = as_object(list(messages))
        ticket = Ticket(Lease(LEASE, SECRET), (self.address,), FINGERPRINT, TOKENS)
        return self._relayed(ticket, kv, 0)

    def _relayed(self, ticket: Ticket, kv: Any, start: int) -> list[Frame]:
        self.relay.offer(ticket, kv)
        try:
            pull = self.client.pull(
                self.relay.address, ticket, ticket.fingerprint, start, PULL_TIMEOUT_S
            )
            return taken(pull.deliver_to, start)
        finally:
            self.relay.withdraw(ticket)


class LentObjectRef(ObjectRef):
    """The prefill worker is on the same node: its memory is mapped."""

    def handlers(self) -> list[grpc.GenericRpcHandler]:
        self.locate = LocateHandler(self.leases, FINGERPRINT, SharedMemory(1 << 20))
        return [self.locate]

    def sealed(self, frame: Frame) -> Any:
        return seal(frame, LEASE, self.locate.arena)

    def bytes_held(self) -> int:
        return self.leases.gauges().bytes_held + self.locate.arena.bytes_used


class Liar(grpc.GenericRpcHandler):
    """Answers one method with whatever it was given."""

    def __init__(self, method: str, messages: list[bytes]) -> None:
        self._method, self._messages = method, messages

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        assert details.method == self._method
        return grpc.unary_stream_rpc_method_handler(lambda _query, _context: iter(self._messages))


def taken(into: Callable[[Callable[[Frame], None]], float], start: int) -> list[Frame]:
    """Return a decode worker's copies of a pull, from the token on that it lacks."""
    frames: list[Frame] = []

    def store(frame: Frame) -> None:
        part = from_token(frame, start)
        if part is not None:
            frames.append(Frame(part.layer, part.start, part.stop, bytes(part.payload)))

    into(store)
    return sorted(frames, key=lambda frame: frame.layer)


@functools.cache
def reader() -> NixlAgent:
    """One decode worker for all tests: it outlives the prefill workers that it meets."""
    return _agent()


def _agent() -> NixlAgent:
    agent = agent_for("nixl", encrypted=False)
    assert agent is not None
    return agent
