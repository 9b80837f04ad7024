"""`grpc.health.v1`, as probes ask it."""

import asyncio
from types import SimpleNamespace

import grpc
import pytest
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse

from specprefill.gateway.grpc import health_service as grpc_health
from specprefill.gateway.grpc.health_service import (
    LEAST_UNATTENDED_S,
    MOST_WATCHERS,
    SERVICE,
    UNATTENDED_PERIODS,
    GrpcHealth,
)
from specprefill.gateway.openai.failures import RpcFailed

Status = HealthCheckResponse


def period_s():
    """As `app.py` configures it."""
    return 3.0


@pytest.fixture
def limit():
    return SimpleNamespace(draining=False)


async def state(health, limit, service=""):
    service_health = GrpcHealth(health, limit, period_s)
    return (await service_health.check(HealthCheckRequest(service=service))).status


async def test_it_serves_while_prompts_can_be_answered(health, limit):
    assert await state(health, limit) == Status.SERVING
    assert await state(health, limit, SERVICE) == Status.SERVING
    assert await state(health, limit, "other.Service") == Status.SERVICE_UNKNOWN
    health.counts["decode"] = 0
    assert await state(health, limit) == Status.NOT_SERVING


async def test_a_gateway_that_drains_does_not_serve(health, limit):
    limit.draining = True
    assert await state(health, limit) == Status.NOT_SERVING


class Context:
    """The status that a call ends with."""

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        self.details = details


@pytest.fixture
def polls(health, monkeypatch):
    """Counts the polls, which follow each other at once."""
    monkeypatch.setattr(grpc_health, "_PERIOD_S", 0.0)

    async def count():
        polls.number += 1
        if polls.fails is not None:
            raise polls.fails
        return await health()

    polls = SimpleNamespace(count=count, number=0, fails=None)
    return polls


@pytest.fixture
def service(polls, limit):
    return GrpcHealth(polls.count, limit, period_s)


def watch(service, name=""):
    return service.watch(HealthCheckRequest(service=name), Context())


async def next_status(changes):
    async with asyncio.timeout(5):
        return (await anext(changes)).status


async def polls_within(polls, turns):
    """The polls while the event loop turns this often."""
    before = polls.number
    for _ in range(turns):
        await asyncio.sleep(0)
    return polls.number - before


async def test_watching_streams_each_change(health, service):
    changes = watch(service)
    assert await next_status(changes) == Status.SERVING
    health.counts["prefill"] = 0
    assert await next_status(changes) == Status.NOT_SERVING
    health.counts["prefill"] = 1
    assert await next_status(changes) == Status.SERVING
    await changes.aclose()


@pytest.mark.parametrize("name", ["", "other.Service"])
async def test_streams_end_with_the_service_or_when_serve_asks_no_more(polls, limit, name):
    clock = SimpleNamespace(s=0.0)
    for goes in ("drains", "is replaced"):
        service = GrpcHealth(polls.count, limit, period_s, lambda: clock.s)
        changes = watch(service, name)
        await next_status(changes)
        clock.s += LEAST_UNATTENDED_S
        service.attend()
        clock.s += LEAST_UNATTENDED_S
        assert await polls_within(polls, turns=100) > 0  # nothing has changed
        if goes == "drains":
            limit.draining = True
        else:
            clock.s += 1.0
        async with asyncio.timeout(5):
            rest = [change.status async for change in changes]
        assert rest == ([Status.NOT_SERVING] if goes == "drains" and not name else [])
        limit.draining = False


async def test_a_gateway_that_serve_asks_rarely_stays_serving(health, polls, limit):
    clock = SimpleNamespace(s=0.0)
    service = GrpcHealth(polls.count, limit, lambda: 20.0, lambda: clock.s)
    changes = watch(service)
    assert await next_status(changes) == Status.SERVING
    change = asyncio.create_task(anext(changes))
    for _ in range(3):
        clock.s += 20.0
        assert await polls_within(polls, turns=100) > 0
        assert not change.done()
        service.attend()
    health.counts["decode"] = 0
    assert (await asyncio.wait_for(change, 5)).status == Status.NOT_SERVING
    clock.s += 20.0 * UNATTENDED_PERIODS + 1.0
    async with asyncio.timeout(5):
        assert [each.status async for each in changes] == []


async def test_while_serve_asks_for_nothing_a_new_watcher_gets_no_status(polls, limit):
    clock = SimpleNamespace(s=0.0)
    service = GrpcHealth(polls.count, limit, period_s, lambda: clock.s)
    clock.s += LEAST_UNATTENDED_S + 1.0
    async with asyncio.timeout(5):
        assert [each.status async for each in watch(service)] == []
    assert (await service.check(HealthCheckRequest())).status == Status.SERVING


async def test_who_watches_another_service_learns_once_that_it_is_unknown(health, service):
    changes = watch(service, "other.Service")
    assert await next_status(changes) == Status.SERVICE_UNKNOWN
    second = asyncio.create_task(anext(changes))
    health.counts["prefill"] = 0
    done, _ = await asyncio.wait([second], timeout=0.1)
    assert not done
    second.cancel()
    await asyncio.wait([second])


async def test_all_watchers_are_woken_by_one_poll(health, service, polls):
    watchers = [watch(service) for _ in range(20)]
    await asyncio.gather(*(next_status(each) for each in watchers))
    waiting = [asyncio.create_task(next_status(each)) for each in watchers]
    assert 0 < await polls_within(polls, turns=100) <= 100  # each poll takes a turn
    health.counts["decode"] = 0
    assert set(await asyncio.gather(*waiting)) == {Status.NOT_SERVING}
    for each in watchers[1:]:
        await each.aclose()
    assert await polls_within(polls, turns=100) > 0
    await watchers[0].aclose()
    assert await polls_within(polls, turns=100) == 0


async def test_a_new_watcher_learns_the_state_of_now_and_not_what_was_last_polled(health, service):
    first = watch(service)
    assert await next_status(first) == Status.SERVING
    await first.aclose()
    health.counts["decode"] = 0
    second = watch(service)
    assert await next_status(second) == Status.NOT_SERVING
    await second.aclose()


async def test_one_watcher_too_many_is_refused(service):
    watchers = [watch(service) for _ in range(MOST_WATCHERS)]
    for each in watchers:
        await next_status(each)
    context = Context()
    refused = service.watch(HealthCheckRequest(), context)
    with pytest.raises(RpcFailed, match="streams its health to 64 watchers already"):
        await next_status(refused)
    assert context.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "call Check, or watch later" in context.details
    assert (await service.check(HealthCheckRequest())).status == Status.SERVING
    for each in watchers:
        await each.aclose()


async def cancel_while_waiting(changes):
    waiting = asyncio.create_task(anext(changes))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def throw_as_serve_does(changes):
    with pytest.raises(asyncio.CancelledError):
        await changes.athrow(asyncio.CancelledError())


async def close(changes):
    await changes.aclose()


@pytest.mark.parametrize("leave", [cancel_while_waiting, throw_as_serve_does, close])
async def test_a_watcher_that_leaves_frees_its_place(service, leave):
    for _ in range(2):
        watchers = [watch(service) for _ in range(MOST_WATCHERS)]
        for each in watchers:
            assert await next_status(each) == Status.SERVING
        for each in watchers:
            await leave(each)


async def test_a_poll_that_fails_ends_every_watcher_and_frees_its_place(service, polls):
    for _ in range(2):
        polls.fails = None
        watchers = [watch(service) for _ in range(MOST_WATCHERS)]
        for each in watchers:
            assert await next_status(each) == Status.SERVING
        polls.fails = RuntimeError("no answer from the controller")
        for each in watchers:
            with pytest.raises(RuntimeError, match="no answer"):
                await next_status(each)


async def test_every_service_is_listed(health, limit):
    listed = await GrpcHealth(health, limit, period_s).list()
    assert {name: each.status for name, each in listed.statuses.items()} == {
        "": Status.SERVING, SERVICE: Status.SERVING,
    }  # fmt: skip
