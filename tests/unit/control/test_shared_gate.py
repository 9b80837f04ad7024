"""One gate for several gateways: what leaves, what is silent, what is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specprefill.control.admission import AdmissionPolicy
from specprefill.control.gate import Gate
from specprefill.control.gateway_share import GatewayShare
from specprefill.control.request_summary import RequestSummary
from specprefill.control.shared_gate import SILENT_S, GateEntry, OpenRequests, View
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.errors import DeadlineExceeded, Overloaded
from specprefill.core.types import Plan, PlanKind, Reason
from specprefill.gateway.pools.gate_client import RENEW_S, GateLost, SharedAdmission
from tests.unit.control.gate_links import Link, connected, shared_gate
from tests.unit.control.virtual_time import run_in_virtual_time

POLICY = AdmissionPolicy(2.0, max_waiting=8, max_waiting_per_key=2)
VIEW = View(StageCurves(Curve(0.01), Curve(0.0, 1e-3), Curve(), Curve()), GatewayShare(1, 1, 2))
SLOTS = 2  # of one speculator and one prefill engine


def arrival(
    key: str | None = None, timeout_s: float = 30.0, priority: int = 0, floor: float = 0.1
) -> RequestSummary:
    plan = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)
    return RequestSummary(1000, plan, floor, timeout_s, key, priority)


def entry(gateway: str, number: int, **fields) -> GateEntry:
    return GateEntry(gateway, number, arrival(**fields), VIEW)


def own_gate() -> Gate:
    return Gate(
        POLICY,
        per_engine=1,
        fair_keys=True,
        curves=lambda: VIEW.curves,
        engines=lambda: VIEW.engines,
        now=asyncio.get_running_loop().time,
    )


async def let_run() -> None:
    for _ in range(8):
        await asyncio.sleep(0)


def state(gate) -> tuple[int, int]:
    return gate.gate.running, gate.gate.waiting


async def filled(gate) -> None:
    for number in range(SLOTS):
        assert (await gate.enter(entry("a", number))).plan is not None


def in_virtual_time(test):
    """Run a coroutine function as a test in virtual time."""

    def run_it(*args, **kwargs):
        run_in_virtual_time(test(*args, **kwargs))

    run_it.__name__ = test.__name__
    return run_it


@in_virtual_time
async def test_a_slot_of_one_gateway_passes_to_the_other_at_the_first_token():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    waiting = asyncio.create_task(gate.enter(entry("b", 0)))
    await let_run()
    assert state(gate) == (SLOTS, 1)
    gate.leave("a", 0, first_token=True)
    assert (await waiting).plan is not None
    assert state(gate) == (SLOTS, 0)


@in_virtual_time
async def test_a_request_that_leaves_while_it_waits_takes_no_slot():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    waiting = asyncio.create_task(gate.enter(entry("b", 0)))
    await let_run()
    gate.leave("b", 0, first_token=False)
    assert (await waiting).plan is None
    gate.leave("a", 0, first_token=True)
    assert state(gate) == (SLOTS - 1, 0)


@in_virtual_time
async def test_a_request_that_leaves_as_its_turn_comes_gives_the_slot_back():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    waiting = asyncio.create_task(gate.enter(entry("b", 0)))
    await let_run()
    gate.leave("a", 0, first_token=True)
    gate.leave("b", 0, first_token=False)
    assert (await waiting).plan is None
    assert state(gate) == (SLOTS - 1, 0)


@in_virtual_time
async def test_the_slots_of_a_gateway_that_died_are_released():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    waiting = asyncio.create_task(gate.enter(entry("b", 0)))
    await asyncio.sleep(SILENT_S + 1.0)
    gate.renew("b", VIEW, OpenRequests(1, (0,)))
    assert (await waiting).plan is not None
    assert state(gate) == (1, 0)


@in_virtual_time
async def test_one_key_cannot_fill_the_queue_through_two_gateways():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    waiting = [asyncio.create_task(gate.enter(entry(name, 9, key="much"))) for name in ("a", "b")]
    await let_run()
    refused = await gate.enter(entry("b", 10, key="much"))
    with pytest.raises(Overloaded) as shed:
        refused.accepted_plan()
    assert (shed.value.reason, state(gate)) == ("key_queue_full", (SLOTS, 2))
    for name in ("a", "b"):
        gate.leave(name, 9, first_token=False)
    await asyncio.gather(*waiting)


@in_virtual_time
async def test_no_key_passes_another_by_a_priority_of_its_own():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    order = []

    async def enter(number, key, priority):
        await gate.enter(entry("b", number, key=key, priority=priority, floor=0.3))
        order.append(key)
        gate.leave("b", number, first_token=True)

    asked = (("patient", 0), ("urgent", -(2**31)), ("generous", 5))
    async with asyncio.TaskGroup() as entering:
        for number, (key, priority) in enumerate(asked):
            entering.create_task(enter(number, key, priority))
            await let_run()
        gate.leave("a", 0, first_token=True)  # one after the other gets this slot
    assert order == ["patient", "urgent", "generous"]


@in_virtual_time
async def test_a_client_that_leaves_frees_the_place_in_the_shared_queue():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    async with connected(gate, own_gate(), 1, VIEW) as admission:
        waiting = asyncio.create_task(admission.enter(arrival()))
        await let_run()
        assert state(gate) == (SLOTS, 1)
        waiting.cancel()
        await asyncio.wait([waiting])
        await let_run()
        assert state(gate) == (SLOTS, 0)


@in_virtual_time
async def test_a_slot_that_comes_as_its_client_leaves_goes_back():
    for ticks in range(8):  # the answer is on its way for a few of them
        gate = shared_gate(POLICY, 1)
        await filled(gate)
        async with connected(gate, own_gate(), 1, VIEW) as admission:
            entering = asyncio.create_task(admission.enter(arrival()))
            await let_run()
            gate.leave("a", 0, first_token=True)
            for _ in range(ticks):
                await asyncio.sleep(0)
            entering.cancel()
            (outcome,) = await asyncio.gather(entering, return_exceptions=True)
            if not isinstance(outcome, BaseException):
                outcome.release()
            await let_run()
            assert state(gate) == (SLOTS - 1, 0), ticks


@in_virtual_time
async def test_a_request_of_a_gateway_that_was_silent_waits_on():
    gate, own = shared_gate(POLICY, 1), own_gate()
    await filled(gate)
    async with connected(gate, own, 1, VIEW) as admission:
        waiting = asyncio.create_task(admission.enter(arrival()))
        await let_run()
        gate._forget("gateway 1")  # as when its renewals do not arrive
        (await waiting).release()
        assert (state(gate), own.running) == ((SLOTS, 0), 0)


@in_virtual_time
async def test_a_request_in_the_shared_queue_times_out_by_itself():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    async with connected(gate, own_gate(), 1, VIEW) as admission:
        with pytest.raises(DeadlineExceeded, match="timed out in the admission queue"):
            await admission.enter(arrival(timeout_s=1.5))
        assert state(gate) == (SLOTS, 0)


class Unreliable:
    """Connects to a gate that can be lost, and comes back as another."""

    def __init__(self) -> None:
        self.gate = shared_gate(POLICY, 1)
        self.link: Link | None = None
        self.is_away = False

    async def connect(self) -> Link:
        if self.is_away:
            raise GateLost("away")
        self.link = Link(self.gate)
        return self.link


async def becomes(admission: SharedAdmission, shared: bool) -> None:
    while admission.is_shared is not shared:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # in virtual time


class Lossy(Unreliable):
    """Connects to a gate over a link that loses messages on request."""

    def __init__(self) -> None:
        super().__init__()
        now = asyncio.get_running_loop().time
        self.admission = SharedAdmission(self.connect, own_gate(), "b", lambda: VIEW, now)

    async def start(self) -> None:
        self.admission.start()
        await becomes(self.admission, True)

    @contextmanager
    def losing(self) -> Iterator[None]:
        self.link.drops = True
        yield
        self.link.drops = False


async def two_renewals() -> None:
    await asyncio.sleep(2 * RENEW_S + 0.1)


@in_virtual_time
async def test_a_first_token_whose_message_was_lost_frees_its_slot_all_the_same():
    process = Lossy()
    await process.start()
    slot = await process.admission.enter(arrival())
    with process.losing():
        slot.record_first_token()
    assert state(process.gate) == (1, 0)
    await two_renewals()
    assert state(process.gate) == (0, 0)
    assert process.gate.gate._decoding._samples == 1  # it is still being answered
    slot.release()
    assert process.gate.gate._decoding._samples == 0
    await process.admission.close()


@in_virtual_time
async def test_a_request_whose_last_message_was_lost_holds_nothing_after_two_renewals():
    for has_token in (False, True):
        process = Lossy()
        await process.start()
        slots = [await process.admission.enter(arrival()) for _ in range(SLOTS)]
        if has_token:
            slots[0].record_first_token()
        with process.losing():
            slots[0].release()
        assert len(process.gate._held) == SLOTS
        await two_renewals()
        assert state(process.gate) == (1, 0)
        assert (list(process.gate._held), process.gate.gate._decoding._samples) == ([("b", 1)], 0)
        await process.admission.close()


@in_virtual_time
async def test_a_client_that_leaves_the_queue_unnoticed_takes_no_slot():
    process = Lossy()
    await process.start()
    await filled(process.gate)
    leaving, staying = (asyncio.create_task(process.admission.enter(arrival())) for _ in range(2))
    await let_run()
    with process.losing():
        leaving.cancel()
        await asyncio.wait([leaving])
    assert state(process.gate) == (SLOTS, 2)
    await two_renewals()
    assert state(process.gate) == (SLOTS, 1)
    process.gate.leave("a", 0, first_token=True)
    (await staying).release()
    await process.admission.close()


@in_virtual_time
async def test_a_renewal_says_nothing_of_requests_that_came_after_it():
    gate = shared_gate(POLICY, 1)
    await filled(gate)
    gate.renew("a", VIEW, OpenRequests(1, (0,)))
    assert state(gate) == (SLOTS, 0)


@in_virtual_time
async def test_without_the_shared_gate_a_gateway_decides_by_itself_until_it_is_back():
    process, own = Unreliable(), own_gate()
    now = asyncio.get_running_loop().time
    admission = SharedAdmission(process.connect, own, "b", lambda: VIEW, now)
    admission.start()
    await becomes(admission, True)
    await filled(process.gate)
    waiting = asyncio.create_task(admission.enter(arrival()))
    await let_run()
    assert (state(process.gate), own.running) == ((SLOTS, 1), 0)
    assert (admission.waiting, admission.running) == (1, 0)

    await asyncio.sleep(5.0)
    process.is_away = True
    process.link.lose()
    slot = await waiting  # its place is lost, its request is not
    assert slot.waited_s == pytest.approx(5.0, abs=0.1)  # nor is the time that it has used up
    await becomes(admission, False)
    assert (own.running, admission.running, admission.waiting) == (1, 1, 0)
    slot.record_first_token()
    assert own.running == 0

    process.gate, process.is_away = shared_gate(POLICY, 1), False
    await becomes(admission, True)
    (await admission.enter(arrival())).release()
    assert (state(process.gate), own.running) == ((0, 0), 0)
    await admission.close()
