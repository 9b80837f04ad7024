"""Serve's request router for the prefill pool: it goes where a prompt's prefix is cached."""

from __future__ import annotations

from collections.abc import Sequence

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ..wire import unpack
from .affinity import PrefillLoad, PrefixAffinity

CACHE_TOKENS = "prefix_cache_tokens"  # in a prefill replica's metadata
_NO_LOAD = PrefillLoad(0, ())


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """One per gateway replica. The load of a prompt is the call's second argument."""

    def initialize_state(self) -> None:
        """Called once, by Serve."""
        self._affinity = PrefixAffinity()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank per replica, cheapest first; Serve passes over those that are full."""
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        self._affinity.know(
            {
                name: replica.replica_metadata.get(CACHE_TOKENS, 0)
                for name, replica in replicas.items()
            }
        )
        return [[replicas[name]] for name in self._names(pending_request)]

    def _names(self, pending_request: PendingRequest | None) -> Sequence[str]:
        if pending_request is None:
            return self._affinity.ranked(_NO_LOAD)
        request_id = pending_request.metadata.internal_request_id
        return self._affinity.choose(request_id, _load(pending_request))

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: object
    ) -> None:
        """A replica took the request."""
        del result
        request_id = pending_request.metadata.internal_request_id
        self._affinity.sent(request_id, replica_id.unique_id, _load(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """The request ended, in whatever way."""
        del replica_id
        self._affinity.answered(internal_request_id)


def _load(pending_request: PendingRequest) -> PrefillLoad:
    _payload, load = pending_request.args
    return unpack(load, PrefillLoad)
