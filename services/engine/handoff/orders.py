"""Values that pass between the connector's halves, and to the services."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)

from ...config import KvTls
from ...core.types import Lease, Ticket


@dataclass(frozen=True, slots=True)
class HandoffConfig:
    """The connector's `kv_connector_extra_config`."""

    carrier: str  # as in KvConfig
    memory: str  # as in KvConfig
    host: str | None  # address to listen on; the worker's own node's if absent
    lease_s: float
    max_held_bytes: int
    staging_bytes: int  # of them, in host buffers for copies under way
    pull_timeout_s: float
    tls: KvTls | None
    streams: int
    stages_layers: bool  # this engine copies KV out layer by layer
    peer_tensor_parallel_size: int  # of the engines at the other end
    peer_pipeline_parallel_size: int
    adapters: list[str]  # of the main model, as name=path


@dataclass
class KvEndpoint(KVConnectorHandshakeMetadata):  # type: ignore[misc]
    """A prefill worker's address, and the layout of what it serves."""

    address: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Stage:
    """Copy tokens `[start, stop)` of a request out of its blocks, layer by layer."""

    lease: Lease
    start: int
    stop: int
    tokens: int  # of the request, that are handed over
    blocks: list[list[int]]  # by KV cache group; of a recurrent one, that of the state at `stop`

    @property
    def is_last(self) -> bool:
        """True if no later stage of the request follows."""
        return self.stop == self.tokens


@dataclass(frozen=True, slots=True)
class Pull:
    """Fetch tokens `[start, stop)` of a lease into a request's blocks."""

    request_id: str
    ticket: Ticket
    start: int
    stop: int
    blocks: list[list[int]]  # by KV cache group; of a recurrent one, that of the state at `stop`


@dataclass
class Orders(KVConnectorMetadata):  # type: ignore[misc]
    """One step's work for the workers."""

    stages: list[Stage] = field(default_factory=list)
    pulls: list[Pull] = field(default_factory=list)
    drops: list[Lease] = field(default_factory=list)
    issued: list[str] = field(default_factory=list)  # leases whose ticket is on its way


@dataclass
class PullTimes(KVConnectorWorkerMetadata):  # type: ignore[misc]
    """Seconds that ended pulls took after their KV was complete at the peer, by request."""

    exposed_s: dict[str, float]

    def aggregate(self, other: KVConnectorWorkerMetadata) -> KVConnectorWorkerMetadata:
        """Merge several ranks' times; the slowest counts."""
        requests = self.exposed_s.keys() | other.exposed_s.keys()
        return PullTimes(
            {
                request_id: max(
                    self.exposed_s.get(request_id, 0.0), other.exposed_s.get(request_id, 0.0)
                )
                for request_id in requests
            }
        )
