"""The prefill pool's router in Serve's own routing loop, over replicas that are none."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.default_impl import get_request_metadata
from ray.serve.context import _set_request_context
from ray.serve.request_router import PendingRequest

from specprefill.core.wire import pack
from specprefill.gateway.pools.affinity import BLOCK_TOKENS, PrefillLoad
from specprefill.gateway.pools.prefix_router import CACHE_TOKENS, PrefixRouter
from specprefill.gateway.serve_internals import call_alone

POOL = DeploymentID("Prefill", "app")
LOAD = PrefillLoad(4 * BLOCK_TOKENS, (1, 2, 3, 4))


class Replica:
    """The part of Serve's replica wrapper that routing touches."""

    max_ongoing_requests = 8
    replica_metadata: ClassVar[dict[str, int]] = {CACHE_TOKENS: 1000 * BLOCK_TOKENS}

    def __init__(self, name: str, ongoing: int = 0) -> None:
        self.replica_id = ReplicaID(name, POOL)
        self.ongoing = ongoing
        self.probes = 0

    async def get_queue_len(self, *, deadline_s: float) -> int:
        self.probes += 1
        return self.ongoing


class Handle:
    """Makes the metadata of a call as Serve's handles do."""

    def remote(self, *args: Any) -> PendingRequest:
        options = SimpleNamespace(
            method_name="prefill", multiplexed_model_id="", session_id="", stream=True,
            _by_reference=False, request_serialization="", response_serialization="",
        )  # fmt: skip
        init = SimpleNamespace(_source=None, _run_router_in_separate_loop=False)
        return PendingRequest(
            args=list(args), kwargs={}, metadata=get_request_metadata(init, options)
        )


class Result:
    """A call's result; `end` ends it."""

    def __init__(self) -> None:
        self.callbacks: list[Any] = []

    def add_done_callback(self, callback: Any) -> None:
        self.callbacks.append(callback)

    def end(self) -> None:
        for callback in self.callbacks:
            callback(None)


def router(*replicas: Replica) -> PrefixRouter:
    made = PrefixRouter(POOL, DeploymentHandleSource.REPLICA, initial_backoff_s=0.01)
    made.initialize_state()
    made.update_replicas(list(replicas))
    return made


def call() -> PendingRequest:
    return call_alone(Handle(), b"payload", pack(LOAD))


async def routed(made: PrefixRouter, pending: PendingRequest) -> str:
    async with asyncio.timeout(5):
        replica = await made._choose_replica_for_request(pending)
    return replica.replica_id.unique_id


async def test_calls_of_one_request_have_ids_of_their_own_and_share_the_callers() -> None:
    _set_request_context(request_id="client", _internal_request_id="shared")
    first, second = call().metadata, call().metadata
    assert len({first.internal_request_id, second.internal_request_id, "shared"}) == 3
    assert first.request_id == second.request_id == "client"
    assert Handle().remote().metadata.internal_request_id == "shared"  # the caller's own context


async def test_every_prompt_of_one_request_finds_a_replica() -> None:
    _set_request_context(_internal_request_id="shared")
    made = router(Replica("a"), Replica("b"))
    names = await asyncio.gather(*(routed(made, call()) for _ in range(16)))
    assert set(names) == {"a", "b"}
    assert made.num_pending_requests == 0


async def test_full_replicas_are_asked_again_after_a_pause() -> None:
    full = [Replica("a", ongoing=8), Replica("b", ongoing=8)]
    made = router(*full)
    waiting = asyncio.create_task(routed(made, call()))
    turns = 0
    deadline = asyncio.get_running_loop().time() + 0.5
    while asyncio.get_running_loop().time() < deadline:
        await asyncio.sleep(0)
        turns += 1
    assert not waiting.done()
    assert full[0].probes < 20  # 0.01 s, twice as long each time
    assert turns > 1000  # everybody else has the event loop
    full[1].ongoing = 0
    assert await waiting == "b"


async def test_a_caller_that_leaves_a_full_pool_leaves_no_load_behind() -> None:
    full = [Replica("a", ongoing=8), Replica("b", ongoing=8)]
    made = router(*full)
    waiting = [asyncio.create_task(routed(made, call())) for _ in range(3)]
    while len(made._affinity._choices) < len(waiting):  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.sleep(0)
    assert not made._affinity._choices
    assert all(each.queued_tokens == 0 for each in made._affinity._replicas.values())


async def test_a_caller_that_leaves_before_the_replica_accepts_leaves_no_load_behind() -> None:
    made = router(Replica("a"), Replica("b"))
    pending = call()
    name = await routed(made, pending)
    assert made._affinity._choices
    made.on_request_completed(ReplicaID(name, POOL), pending.metadata.internal_request_id)
    assert not made._affinity._choices
    assert all(each.queued_tokens == 0 for each in made._affinity._replicas.values())


async def test_a_call_counts_until_it_ends_and_only_once() -> None:
    made = router(Replica("a"), Replica("b"))
    pending, result = call(), Result()
    name = await routed(made, pending)
    made.on_request_routed(pending, ReplicaID(name, POOL), result)
    made.on_request_completed(ReplicaID(name, POOL), pending.metadata.internal_request_id)
    assert made._affinity._running  # that was an attempt which a full replica had rejected
    result.end()
    await asyncio.sleep(0)
    assert not made._affinity._running
    assert await routed(made, call()) == name  # where its prefix is now


@pytest.mark.parametrize("gone", ["a", "b"])
async def test_a_replica_that_is_gone_is_not_chosen(gone: str) -> None:
    replicas = {name: Replica(name) for name in "ab"}
    made = router(*replicas.values())
    await routed(made, call())
    made.update_replicas([replica for name, replica in replicas.items() if name != gone])
    assert await routed(made, call()) != gone
