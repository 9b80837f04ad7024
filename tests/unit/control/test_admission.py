"""Admission: the decision about a request, the order of the queue, and the gate."""

import asyncio
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.control.admission import (
    AdmissionPolicy,
    AdmissionRequest,
    Admitted,
    Backlog,
    Shed,
    ShedReason,
    judge,
    tokens_within,
)
from specprefill.control.admitting import AdmittingPipeline
from specprefill.control.fair_queue import FairQueue
from specprefill.control.gate import Gate
from specprefill.control.gateway_share import GatewayShare
from specprefill.control.request_summary import RequestSummary
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.errors import DeadlineExceeded, Overloaded
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator, PlannedPipeline
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import (
    Chunk,
    Controls,
    Plan,
    PlanKind,
    Reason,
    Request,
    TtftEstimate,
)

CURVES = StageCurves(Curve(0.1), Curve(0.0, 1e-3), Curve(), Curve())
POLICY = AdmissionPolicy(ttft_s=2.0, headroom=1.0, max_waiting=10, max_waiting_per_key=4)
ASK = AdmissionRequest(prompt_tokens=4000, keep=0.3, floor=0.1, deadline_s=30.0)


def test_without_a_queue_the_planned_rate_holds():
    assert judge(ASK, Backlog(), CURVES, POLICY) == Admitted(0.3, False, 1.3, 1.2)


def test_a_queue_lowers_the_keep_rate_to_the_floor():
    rates = [judge(ASK, Backlog(prefill_s=wait), CURVES, POLICY).keep for wait in (0.5, 1.0, 1.5)]
    assert 0.3 > rates[0] > rates[1] > rates[2] >= 0.1
    assert rates[2] == pytest.approx(0.1)


def test_the_next_turn_of_a_long_conversation_costs_what_is_new():
    curves = StageCurves(Curve(0.1, 1e-3), Curve(0.0, 1e-3), Curve(), Curve())
    turn = AdmissionRequest(64_000, 0.3, 0.1, 30.0, cached_tokens=19_000, remembered_tokens=63_500)
    verdict = judge(turn, Backlog(), curves, POLICY)
    assert verdict == Admitted(0.3, False, pytest.approx(0.1 + 0.5 + 0.2), pytest.approx(0.2))
    forgotten = judge(
        replace(turn, cached_tokens=0, remembered_tokens=0), Backlog(), curves, POLICY
    )
    assert not isinstance(forgotten, Admitted) or forgotten.late


def test_requests_that_cannot_meet_the_slo_wait_behind_those_that_can():
    verdict = judge(ASK, Backlog(prefill_s=3.0, late_s=10.0), CURVES, POLICY)
    assert isinstance(verdict, Admitted)
    assert verdict.late
    assert verdict.keep == 0.1
    assert verdict.ttft_s == pytest.approx(10.4)


def test_a_request_that_cannot_meet_its_deadline_gets_a_time_to_retry():
    verdict = judge(ASK, Backlog(prefill_s=3.0, late_s=40.0), CURVES, POLICY)
    assert verdict == Shed(ShedReason.DEADLINE, pytest.approx(10.4))


@pytest.mark.parametrize(
    ("backlog", "reason"),
    [
        (Backlog(waiting=10), ShedReason.QUEUE_FULL),
        (Backlog(waiting_of_key=4), ShedReason.KEY_QUEUE_FULL),
    ],
)
def test_a_full_queue_sheds(backlog, reason):
    verdict = judge(ASK, backlog, CURVES, POLICY)
    assert isinstance(verdict, Shed)
    assert verdict.reason is reason


def test_late_requests_take_no_queue_slot_of_those_in_time():
    assert isinstance(judge(ASK, Backlog(waiting_late=50), CURVES, POLICY), Admitted)


def test_a_dense_request_is_never_pruned():
    ask = replace(ASK, keep=1.0, floor=1.0)
    verdict = judge(ask, Backlog(), CURVES, POLICY)
    assert isinstance(verdict, Admitted)
    assert (verdict.keep, verdict.late) == (1.0, True)


@given(
    keep=st.floats(0.02, 1.0),
    floor_share=st.floats(0.05, 1.0),
    waits=st.tuples(st.floats(0, 50), st.floats(0, 50), st.floats(0, 50)),
    tokens=st.integers(1, 100_000),
)
def test_the_keep_rate_stays_between_the_callers_floor_and_the_plan(
    keep, floor_share, waits, tokens
):
    ask = AdmissionRequest(tokens, keep, keep * floor_share, 30.0)
    verdict = judge(ask, Backlog(*waits), CURVES, POLICY)
    if isinstance(verdict, Admitted):
        assert ask.floor - 1e-9 <= verdict.keep <= keep + 1e-9
        assert verdict.ttft_s <= 30.0
    else:
        assert verdict.retry_after_s > 0


@given(budget=st.floats(0.02, 20.0), token_s=st.floats(1e-6, 1e-3), pair_s=st.floats(0, 1e-8))
def test_tokens_within_is_the_inverse_of_the_curve(budget, token_s, pair_s):
    curve = Curve(0.01, token_s, pair_s)
    assert curve.seconds(tokens_within(curve, budget)) == pytest.approx(budget, rel=1e-6)


def order(queue):
    return [queue.pop() for _ in range(len(queue))]


def test_a_short_request_passes_the_long_ones_of_others():
    queue = FairQueue()
    for name in ("long 1", "long 2", "long 3"):
        queue.push(name, 10.0, late=False)
    queue.push("short", 0.5, late=False)
    assert queue.pop() == "short"


def test_long_requests_are_not_overtaken_forever():
    queue = FairQueue()
    queue.push("long", 3.0, late=False)
    popped = []
    for place in range(10):
        queue.push(f"short {place}", 1.0, late=False)
        popped.append(queue.pop())
    assert "long" in popped[:4]


def test_a_busy_key_waits_behind_a_quiet_one():
    queue = FairQueue()
    for place in range(5):
        queue.push(f"much {place}", 1.0, key="much", late=False)
    for place in range(2):
        queue.push(f"little {place}", 1.0, key="little", late=False)
    assert order(queue)[:4] == ["much 0", "little 0", "much 1", "little 1"]


def test_priority_goes_first_and_late_ones_last():
    queue = FairQueue()
    queue.push("late", 0.1, late=True)
    queue.push("usual", 5.0, late=False)
    queue.push("urgent", 9.0, priority=-1, late=False)
    assert order(queue) == ["urgent", "usual", "late"]


class AdmissionSetup:
    """A gate of one engine for one request at a time, and a clock that is moved by hand."""

    def __init__(self, **policy):
        self.now_s = 0.0
        self.prompt = tuple(range(4000))
        pools = (FakeSpeculator(), FakePrefiller(), FakeDecoder())
        planner = Planner(enabled=True, keep=0.3, min_prompt_tokens=50)
        self.prefiller = pools[1]
        self.gate = Gate(
            replace(POLICY, **policy),
            per_engine=1,
            fair_keys=True,
            curves=lambda: CURVES,
            engines=lambda: GatewayShare(speculators=0, prefills=1),
            now=lambda: self.now_s,
        )
        self.planner = planner
        admitting = AdmittingPipeline(Pipeline(*pools), self.gate, keep_floor=0.1)
        self.pipeline = PlannedPipeline(admitting, planner)

    async def run(self, **fields):
        request = Request("r", self.prompt, b"", **fields)
        return [chunk async for chunk in self.pipeline.generate(request)]

    def hold(self, **fields):
        """Something that is in front of the engines until it is cancelled."""

        async def held():
            request = Request("held", self.prompt, b"", **fields)
            slot = await self.gate.enter(
                RequestSummary.of(request, self.planner.plan(request), 0.1)
            )
            try:
                await asyncio.Event().wait()
            finally:
                slot.release()

        return asyncio.create_task(held())


async def settled():
    for _ in range(5):
        await asyncio.sleep(0)


async def test_an_idle_service_answers_at_the_planned_rate():
    setup = AdmissionSetup()
    report = (await setup.run())[-1].report
    assert (report.kept_tokens, report.reason, report.queue_s) == (1200, Reason.DEFAULT, 0.0)
    assert (setup.gate.running, setup.gate.waiting) == (0, 0)


async def test_under_load_the_rate_is_lowered_and_the_wait_is_reported():
    setup = AdmissionSetup()
    front = setup.hold()
    await settled()
    behind = asyncio.create_task(setup.run())
    await settled()
    assert (setup.gate.running, setup.gate.waiting) == (1, 1)
    setup.now_s = 0.75
    front.cancel()
    report = (await behind)[-1].report
    assert report.reason is Reason.LOAD
    assert 400 <= report.kept_tokens < 1200
    assert report.queue_s == pytest.approx(0.75)


async def test_a_selection_waits_its_turn_and_gets_the_rate_of_an_answer():
    setup = AdmissionSetup()
    front = setup.hold()
    await settled()
    behind = asyncio.create_task(setup.pipeline.select(Request("r", setup.prompt, b"")))
    await settled()
    assert (setup.gate.running, setup.gate.waiting) == (1, 1)
    setup.now_s = 0.75
    front.cancel()
    selection = await behind
    assert selection.plan.reason is Reason.LOAD
    assert selection.queue_s == pytest.approx(0.75)
    assert (setup.gate.running, setup.gate.waiting) == (0, 0)


@pytest.mark.parametrize("auto", [False, True])
async def test_a_plan_shows_whether_the_queue_lowered_it(auto):
    setup = AdmissionSetup()
    controls = Controls(auto=auto, ceiling=0.3) if auto else Controls()
    asked = Request("r", setup.prompt, b"", controls=controls)
    alone = await setup.pipeline.select(asked)
    front = setup.hold()
    await settled()
    behind = asyncio.create_task(setup.pipeline.select(asked))
    await settled()
    setup.now_s = 0.75
    front.cancel()
    assert (alone.plan.lowered, (await behind).plan.lowered) == (False, True)


async def test_a_selection_is_shed_where_an_answer_is():
    setup = AdmissionSetup(max_waiting=1)
    tasks = [setup.hold() for _ in range(2)]
    await settled()
    with pytest.raises(Overloaded, match="queue is full"):
        await setup.pipeline.select(Request("r", setup.prompt, b""))
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def test_a_selection_holds_no_prefill_engine():
    setup = AdmissionSetup()
    request = Request("r", setup.prompt, b"")
    asked = []

    class Watching(FakeSpeculator):
        async def select(self, request, plan, timeout_s):
            asked.append(setup.gate.backlog().prefill_s)
            return await super().select(request, plan, timeout_s)

    pipeline = Pipeline(Watching(), FakePrefiller(), FakeDecoder())
    admitting = PlannedPipeline(
        AdmittingPipeline(pipeline, setup.gate, keep_floor=0.1), setup.planner
    )
    await admitting.select(request)
    [_ async for _ in admitting.generate(request)]
    assert asked[0] == 0.0 < asked[1]


@pytest.mark.parametrize(
    ("controls", "least"), [(Controls(floor=0.25), 1000), (Controls(keep=0.2), 800)]
)
async def test_the_callers_floor_and_an_asked_rate_hold_under_load(controls, least):
    setup = AdmissionSetup()
    front = setup.hold()
    await settled()
    behind = asyncio.create_task(setup.run(controls=controls))
    await settled()
    front.cancel()
    assert (await behind)[-1].report.kept_tokens >= least


async def test_a_full_queue_sheds_with_a_reason_and_a_time():
    setup = AdmissionSetup(max_waiting=1)
    tasks = [setup.hold() for _ in range(2)]
    await settled()
    with pytest.raises(Overloaded) as raised:
        await setup.run()
    assert raised.value.reason == "queue_full"
    assert raised.value.retry_after_s >= 0.5
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (setup.gate.running, setup.gate.waiting) == (0, 0)


async def test_one_key_cannot_fill_the_queue():
    setup = AdmissionSetup(max_waiting_per_key=1)
    tasks = [setup.hold(key="much") for _ in range(2)]
    await settled()
    with pytest.raises(Overloaded) as raised:
        await setup.run(key="much")
    assert raised.value.reason == "key_queue_full"
    other = setup.hold(key="little")
    await settled()
    assert setup.gate.waiting == 2
    for task in [*tasks, other]:
        task.cancel()
    await asyncio.wait([*tasks, other])


async def test_a_request_that_waits_too_long_fails_and_leaves_nothing():
    setup = AdmissionSetup()
    setup.prompt = tuple(range(60))
    front = setup.hold()
    await settled()
    with pytest.raises(DeadlineExceeded, match="timed out in the admission queue"):
        await setup.run(timeout_s=0.25)  # foreseen to be in time, but the one in front never ends
    assert setup.gate.waiting == 0
    front.cancel()
    await asyncio.wait([front])


async def test_one_whose_time_no_longer_suffices_takes_no_engine_from_others():
    setup = AdmissionSetup()
    front = setup.hold()
    await settled()
    waiting = asyncio.create_task(setup.run(timeout_s=3.0))  # 0.5 s of its own, at a lowered rate
    await settled()
    setup.now_s = 2.8
    front.cancel()
    with pytest.raises(Overloaded, match="would miss its deadline") as caught:
        await waiting
    assert caught.value.reason is ShedReason.DEADLINE
    assert (setup.gate.waiting, setup.gate.running) == (0, 0)


async def test_a_request_with_enough_time_left_starts():
    setup = AdmissionSetup()
    front = setup.hold()
    await settled()
    waiting = asyncio.create_task(setup.run(timeout_s=3.0))
    await settled()
    setup.now_s = 1.5
    front.cancel()
    assert (await waiting)[-1].report.queue_s >= 1.5


@pytest.mark.parametrize(("by_itself", "is_learnt"), [(False, True), (True, False)])
async def test_only_queues_make_the_next_requests_expect_to_wait(by_itself, is_learnt):
    setup = AdmissionSetup()

    class Late:
        async def generate(self, request):
            setup.now_s += 10.0
            yield Chunk(0, (1,), "a", late_by_itself=by_itself)

    admitting = PlannedPipeline(
        AdmittingPipeline(Late(), setup.gate, keep_floor=0.1), setup.planner
    )
    assert len([_ async for _ in admitting.generate(Request("r", setup.prompt, b""))]) == 1
    assert (setup.gate.backlog().prefill_s > 0.5) is is_learnt
    assert setup.gate.running == 0


async def test_what_the_planner_foresees_as_cached_takes_no_time_in_the_gate():
    setup = AdmissionSetup()
    expected = TtftEstimate(
        9.0, 1.0, remembered_tokens=3900, dense_cached_tokens=3500, prune_cached_tokens=1100
    )
    request = Request("r", setup.prompt, b"")
    for plan, left_s in (
        (Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3, expected=expected), 0.1),
        (Plan(PlanKind.DENSE, Reason.NO_GAIN, expected=expected), 0.5),
    ):
        slot = await setup.gate.enter(RequestSummary.of(request, plan, 0.1))
        assert setup.gate.backlog().prefill_s == pytest.approx(left_s)
        slot.release()


async def test_the_next_request_starts_at_the_first_token_not_at_the_last():
    setup = AdmissionSetup()
    request = Request("r", tuple(range(4000)), b"")
    stream = setup.pipeline.generate(request)
    await anext(stream)
    assert setup.gate.running == 0
    await stream.aclose()
    assert setup.prefiller.held == 0
