"""The pipeline's metrics."""

from dataclasses import replace

import pytest

from specprefill.config import GatewayConfig
from specprefill.control.admitting import AdmittingPipeline
from specprefill.control.gain import NetGain
from specprefill.control.prefixes import CacheForecast, PrefixMemory
from specprefill.control.stages import StageModels
from specprefill.core.budget import ATTEMPTS
from specprefill.core.errors import DecodeUnavailable, Overloaded, ScoringTimeout
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator, PlannedPipeline
from specprefill.core.fallback import Fallback, OnOverload
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import (
    Chunk,
    Controls,
    Plan,
    PlanKind,
    Reason,
    Report,
    Request,
    TtftEstimate,
)
from specprefill.gateway.observe.metrics import PipelineMetrics, RequestMetrics
from specprefill.gateway.observe.watched import LearningObserver, ObservedPipeline
from tests.instruments import Instruments
from tests.policies import PAPER

REQUEST = Request("r", tuple(range(100, 200)), b"", controls=Controls(keep=0.2))


def ignore(_request, _report):
    """Learn nothing."""


class Rig:
    def __init__(self, learn=None, **decoder):
        self.counted = Instruments()
        self.speculator = FakeSpeculator()
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
        pipeline = Pipeline(self.speculator, FakePrefiller(), FakeDecoder(**decoder))
        observers = [
            RequestMetrics(PipelineMetrics(self.counted)),
            LearningObserver(learn or ignore),
        ]
        self.pipeline = PlannedPipeline(ObservedPipeline(pipeline, observers), planner)

    async def run(self):
        return [chunk async for chunk in self.pipeline.generate(REQUEST)]

    def requests(self, outcome, plan="", reason=""):
        return self.counted.total("specprefill_requests_total", outcome, plan, reason)


async def test_an_answer_is_counted_with_its_plan_and_its_tokens():
    rig = Rig()
    chunks = await rig.run()
    assert chunks[-1].report is not None
    assert rig.requests("answered", "prune", "asked") == 1
    assert rig.counted.total("specprefill_kept_tokens_total") == 20
    assert rig.counted.total("specprefill_prompt_tokens_total") == 100
    assert rig.counted.total("specprefill_prompts_total", "positions") == 1
    assert rig.counted.total("specprefill_prefilled_total", "prefill") == 1
    assert rig.counted.total("specprefill_stage_seconds", "speculate") == 0.25
    assert rig.counted.observed("specprefill_keep_rate") == [0.2]
    assert len(rig.counted.observed("specprefill_time_to_first_token_seconds", "prune")) == 1


async def test_a_failure_is_counted_by_its_name():
    rig = Rig(fails=[DecodeUnavailable("gone")] * ATTEMPTS)
    with pytest.raises(DecodeUnavailable):
        await rig.run()
    assert rig.requests("DecodeUnavailable") == 1


async def test_an_unexpected_failure_is_no_client_that_left():
    rig = Rig(fails=[RuntimeError("a fault")])
    with pytest.raises(RuntimeError):
        await rig.run()
    assert rig.requests("RuntimeError") == 1
    assert rig.requests("client_closed") == 0


async def test_a_shed_selection_is_counted_with_its_reason():
    rig = Rig()
    rig.speculator.fails = Overloaded("full")
    with pytest.raises(Overloaded):
        await rig.pipeline.select(REQUEST)
    assert rig.counted.total("specprefill_shed_total", "speculator_overloaded") == 1
    assert rig.requests("Overloaded") == 0  # it asked for no answer


async def test_a_shed_request_is_counted_with_its_reason():
    rig = Rig()
    rig.speculator.fails = Overloaded("full")
    with pytest.raises(Overloaded):
        await rig.run()
    assert rig.counted.total("specprefill_shed_total", "speculator_overloaded") == 1
    assert rig.requests("Overloaded") == 1


async def test_a_client_that_leaves_is_no_failure():
    rig = Rig()
    stream = rig.pipeline.generate(REQUEST)
    await anext(stream)
    await stream.aclose()
    assert rig.requests("client_closed") == 1


async def test_only_finished_requests_are_learnt_from():
    learnt = []

    def learn(request, report):
        learnt.append((request.request_id, report.kept_tokens))

    rig = Rig(learn, fails=[None, *[DecodeUnavailable("gone")] * ATTEMPTS])
    assert await rig.run()
    with pytest.raises(DecodeUnavailable):
        await rig.run()
    assert learnt == [("r", 20)]


EXPECTED = TtftEstimate(4.0, 1.0)
REPORT = Report(
    PlanKind.PRUNE, Reason.DEFAULT, 100, 20, 0.2,
    queue_s=0.0, speculate_s=0.25, prefill_s=0.5, transfer_s=0.0, first_decode_s=0.0,
    ttft_s=1.0, expected=EXPECTED,
)  # fmt: skip


def ratios(counted, plan="prune"):
    return counted.observed("specprefill_time_to_first_token_ratio", plan)


@pytest.mark.parametrize(
    ("report", "ratio"),
    [
        (replace(REPORT, queue_s=3.0, ttft_s=4.0), 1.0),
        (replace(REPORT, queue_s=3.0, discarded_s=0.5, ttft_s=5.5), 2.0),
        (replace(REPORT, plan=PlanKind.DENSE, queue_s=3.0, ttft_s=7.25), 1.0),
    ],
    ids=["pruned", "discarded", "dense"],
)
def test_waiting_is_no_fault_of_the_stage_times(report, ratio):
    counted = Instruments()
    PipelineMetrics(counted).count_request(REQUEST, "answered", report)
    assert ratios(counted, report.plan.value) == [ratio]


class WaitedSlot:
    """A slot that was free after three seconds."""

    plan = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.2, expected=EXPECTED)
    waited_s = 3.0

    def record_first_token(self, *, by_itself=False):
        pass

    def release(self):
        pass


class BusyGate:
    async def enter(self, _arrival):
        return WaitedSlot()


class Answering:
    async def generate(self, _request):
        yield Chunk(0, (1,), "a", finish_reason="stop", report=REPORT)


async def test_the_wait_for_admission_is_no_fault_of_the_stage_times():
    counted = Instruments()
    admitting = AdmittingPipeline(Answering(), BusyGate(), keep_floor=0.1)
    observed = ObservedPipeline(admitting, [RequestMetrics(PipelineMetrics(counted))])
    request = replace(REQUEST, plan=WaitedSlot.plan)
    (chunk,) = [chunk async for chunk in observed.generate(request)]
    assert (chunk.report.queue_s, chunk.report.ttft_s) == (3.0, 4.0)
    assert ratios(counted) == [1.0]


def test_latencies_are_measured_up_to_the_longest_request():
    counted = Instruments()
    PipelineMetrics(counted)
    for name in ("time_to_first_token_seconds", "stage_seconds"):
        bounds = counted.made[f"specprefill_{name}"].boundaries
        assert bounds[-1] >= GatewayConfig().request_timeout_s


class SlowDraft:
    """A gateway whose draft never ends in time: every scoring costs ten seconds and its request."""

    def __init__(self, on_overload):
        self.gain = NetGain(
            StageModels(),
            *(CacheForecast(PrefixMemory(1000)) for _ in range(2)),
            replace(PAPER, min_kept_tokens=64),
        )
        planner = Planner(enabled=True, keep=0.2, min_prompt_tokens=64, gain=self.gain)
        speculator = FakeSpeculator(fails=ScoringTimeout("slow", 0.0, 10.0))
        pipeline = Pipeline(
            speculator,
            FakePrefiller(),
            FakeDecoder(),
            fallback=Fallback(on_overload, PAPER),
            on_unscored=self.gain.learn_unscored,
        )
        self.pipeline = PlannedPipeline(
            ObservedPipeline(pipeline, [LearningObserver(self.gain.learn)]), planner
        )
        self.asked = 0

    async def ask(self, **controls):
        self.asked += 1
        prompt = tuple((self.asked * 7919 + place) % 50_000 for place in range(4000))
        request = Request(f"{self.asked}", prompt, b"", controls=Controls(**controls))
        return [chunk async for chunk in self.pipeline.generate(request)][-1].report


@pytest.mark.parametrize("on_overload", list(OnOverload))
async def test_a_draft_that_is_too_slow_is_not_waited_for_by_every_request(on_overload):
    gateway = SlowDraft(on_overload)
    tried, reasons = 0, []
    for _ in range(8):
        try:
            reasons.append((await gateway.ask()).reason)
        except Overloaded as error:
            reasons.append(Reason(error.reason))
        tried += reasons[-1] is Reason.SPECULATOR_TIMEOUT
    assert 1 <= tried <= 2
    assert reasons[tried:] == [Reason.NO_GAIN] * (8 - tried)


async def test_callers_who_ask_for_pruning_get_it_though_the_draft_is_slow():
    gateway = SlowDraft(OnOverload.STATIC)
    for _ in range(4):
        await gateway.ask()
    report = await gateway.ask(keep=0.3)
    assert (report.plan, report.reason) == (PlanKind.PRUNE, Reason.SPECULATOR_TIMEOUT)
    assert report.speculate_s == 10.0
