"""Serve's request router for pools with a prefix cache: it prefers replicas with the prefix."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from ...core.wire import unpack
from .affinity import PrefillLoad, PrefixAffinity

CACHE_TOKENS = "prefix_cache_tokens"  # in a replica's metadata
_NO_LOAD = PrefillLoad(0, ())


class CallResult(Protocol):
    """The used part of Serve's result of a call."""

    def add_done_callback(self, callback: Callable[[Any], object]) -> None:
        """Call `callback` when the call has ended, from any thread."""
        ...


class PrefixRouter(RequestRouter):  # type: ignore[misc]
    """The router, one per gateway replica. A call's second argument is the prompt's load.

    Serve matches waiting calls by their internal request id, so every call needs its own: see
    `serve_internals.call_alone`.
    """

    def initialize_state(self) -> None:
        """Initialise the router; Serve calls this once."""
        self._affinity = PrefixAffinity()
        self._candidates: list[RunningReplica] = []
        self._by_name: dict[str, RunningReplica] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return one rank per replica, cheapest first; Serve skips those that are full."""
        if candidate_replicas is not self._candidates:  # Serve makes a new list of every change
            self._set_candidates(candidate_replicas)
        if pending_request is not None:
            # The ranks hold every replica: when none has room, wait before trying them again.
            pending_request.routing_context.should_backoff = True
        return [[self._by_name[name]] for name in self._ranked_names(pending_request)]

    def _set_candidates(self, candidates: list[RunningReplica]) -> None:
        self._candidates = candidates
        self._by_name = {replica.replica_id.unique_id: replica for replica in candidates}
        self._affinity.set_replicas(
            {
                name: replica.replica_metadata.get(CACHE_TOKENS, 0)
                for name, replica in self._by_name.items()
            }
        )

    def _ranked_names(self, pending_request: PendingRequest | None) -> Sequence[str]:
        if pending_request is None:
            return self._affinity.rank(_NO_LOAD)
        call_id = _call_id(pending_request)
        names = self._affinity.choose(call_id, _load(pending_request))
        pending_request.future.add_done_callback(partial(self._forget_cancelled, call_id))
        return names

    def _forget_cancelled(self, call_id: str, routed: asyncio.Future[object]) -> None:
        """Forget a choice whose caller left before a replica had room: no other hook tells."""
        if routed.cancelled():
            self._affinity.record_end(call_id)

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: CallResult
    ) -> None:
        """Record that a replica took the call.

        Its end is learnt from the call itself: see `on_request_completed`.
        """
        call_id, loop = _call_id(pending_request), asyncio.get_running_loop()
        self._affinity.record_sent(call_id, replica_id.unique_id, _load(pending_request))
        result.add_done_callback(
            lambda _: loop.call_soon_threadsafe(self._affinity.record_end, call_id)
        )

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Forget the choice of a call whose caller left before the replica took it.

        Attempts that a full replica rejected are reported as well, under the id of the next one.
        """
        del replica_id
        self._affinity.record_unsent(str(internal_request_id))


def _call_id(pending_request: PendingRequest) -> str:
    return str(pending_request.metadata.internal_request_id)


def _load(pending_request: PendingRequest) -> PrefillLoad:
    """Return the call's load; calls without a prompt, such as for a state, have none."""
    if len(pending_request.args) < 2:
        return _NO_LOAD
    _payload, load, *_ = pending_request.args
    return unpack(load, PrefillLoad)
