"""The pipeline's metrics."""

from dataclasses import replace

import pytest

from specprefill.control.gain import NetGain
from specprefill.control.prefixes import CacheForecast, PrefixMemory
from specprefill.control.stages import StageModels
from specprefill.core.budget import ATTEMPTS
from specprefill.core.errors import DecodeUnavailable, Overloaded, ScoringTimeout
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator, PlannedPipeline
from specprefill.core.fallback import Fallback, OnOverload
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Controls, PlanKind, Reason, Request
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
