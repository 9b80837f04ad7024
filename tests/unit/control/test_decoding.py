"""Admission knows how long a second token would wait for a decode slot."""

from __future__ import annotations

import asyncio
import math

import pytest

from specprefill.control.admission import AdmissionPolicy
from specprefill.control.decoding import Decoding
from specprefill.control.gate import Gate
from specprefill.control.gateway_share import GatewayShare
from specprefill.control.request_summary import RequestSummary
from specprefill.control.shared_gate import SILENT_S, GateEntry, OpenRequests, SharedGate, View
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.types import Plan, PlanKind, Reason
from tests.unit.control.virtual_time import run_in_virtual_time

CURVES = StageCurves(Curve(0.01), Curve(0.0, 1e-4), Curve(), Curve())
PLAN = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)
ANSWER_S = 10.0


def arrival(samples: int = 1) -> RequestSummary:
    return RequestSummary(1000, PLAN, 0.1, 60.0, samples=samples)


def test_samples_beyond_the_slots_wait_for_as_long_as_answers_take():
    now_s = [0.0]
    decoding = Decoding(lambda: now_s[0])
    decoding.begin(1, 1, slots=2.0)
    assert decoding.wait_s(0.0) == decoding.wait_s(2.0) == 0.0
    now_s[0] = ANSWER_S
    decoding.end(1)
    decoding.end(1)
    decoding.begin(2, 4, slots=2.0)  # four samples at two slots
    assert decoding.wait_s(2.0) == pytest.approx(ANSWER_S)
    assert decoding.wait_s(4.0) == 0.0
    decoding.begin(3, 1, slots=2.0)
    now_s[0] += 2 * ANSWER_S
    decoding.end(3)  # it waited for ten seconds, and took ten
    assert decoding.wait_s(2.0) == pytest.approx(ANSWER_S)
    decoding.end(2)
    assert decoding.wait_s(2.0) == 0.0


def gate(gap_s: float, slots: int) -> Gate:
    return Gate(
        AdmissionPolicy(2.0, gap_s),
        per_engine=9,
        fair_keys=False,
        curves=lambda: CURVES,
        engines=lambda: GatewayShare(1, 1, 1, slots),
        now=asyncio.get_running_loop().time,
    )


async def answered(made: Gate, samples: int = 1):
    """A request with its first token, whose answer goes on."""
    slot = await made.enter(arrival(samples))
    slot.record_first_token()
    return slot


@pytest.mark.parametrize(
    ("gap_s", "slots", "is_late"), [(1.0, 2, True), (1.0, 0, False), (math.inf, 2, False)]
)
def test_a_request_is_late_where_decode_has_no_room_in_time(gap_s, slots, is_late):
    async def main() -> None:
        made = gate(gap_s, slots)
        first = await answered(made)
        await asyncio.sleep(ANSWER_S)
        first.release()
        held = [await answered(made, 2) for _ in range(2)]
        slot = await made.enter(arrival())
        assert slot.admitted.late is is_late
        slot.release()
        for each in held:
            each.release()
        assert not (await made.enter(arrival())).admitted.late

    run_in_virtual_time(main())


def test_the_shared_gate_knows_the_answers_of_every_gateway():
    async def main() -> None:
        now = asyncio.get_running_loop().time
        shared = SharedGate(AdmissionPolicy(2.0, 1.0), per_engine=9, fair_keys=False, now=now)
        view = View(CURVES, GatewayShare(1, 1, 2, decode_slots=2))

        async def enter(gateway: str, number: int) -> None:
            assert (await shared.enter(GateEntry(gateway, number, arrival(), view))).plan
            shared.leave(gateway, number, first_token=True)

        await enter("a", 0)
        await asyncio.sleep(ANSWER_S)
        shared.renew("a", view, OpenRequests(1, (), (0,)))
        shared.leave("a", 0, first_token=False)
        for number, gateway in enumerate("ababab", 1):
            await enter(gateway, number)
        assert shared.gate.backlog().decode_s == pytest.approx(4 / 2 * ANSWER_S)
        for number in (2, 4):
            shared.leave("b", number, first_token=False)
        left_s = 0.9**2 * ANSWER_S  # two have ended at once: answers are shorter than they seemed
        assert shared.gate.backlog().decode_s == pytest.approx(2 / 2 * left_s)
        await asyncio.sleep(SILENT_S + 1.0)
        # Gateway b is gone, and its answer with it.
        shared.renew("a", view, OpenRequests(7, (), (1, 3, 5)))
        assert 0.0 < shared.gate.backlog().decode_s < 0.6 * left_s

    run_in_virtual_time(main())
