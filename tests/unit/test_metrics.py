"""The pipeline's metrics."""

import pytest

from specprefill.errors import DecodeUnavailable, Overloaded
from specprefill.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.gateway.metrics import MeasuredPipeline, PipelineMetrics
from specprefill.pipeline import Pipeline
from specprefill.plan import Planner
from specprefill.types import Controls, Request

from ..instruments import Instruments

REQUEST = Request("r", tuple(range(100, 200)), b"", controls=Controls(keep=0.2))


class Rig:
    def __init__(self, learn=None, **decoder):
        self.counted = Instruments()
        self.speculator = FakeSpeculator()
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
        pipeline = Pipeline(self.speculator, FakePrefiller(), FakeDecoder(**decoder), planner)
        self.pipeline = MeasuredPipeline(pipeline, PipelineMetrics(self.counted), learn)

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
    assert rig.counted.total("specprefill_prefilled_total", "prefill") == 1
    assert rig.counted.total("specprefill_stage_seconds", "speculate") == 0.25
    assert rig.counted.observed("specprefill_keep_rate") == [0.2]
    assert len(rig.counted.observed("specprefill_time_to_first_token_seconds", "prune")) == 1


async def test_a_failure_is_counted_by_its_name():
    rig = Rig(fails=[DecodeUnavailable("gone")] * 2)
    with pytest.raises(DecodeUnavailable):
        await rig.run()
    assert rig.requests("DecodeUnavailable") == 1


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


async def test_who_learns_is_told_of_finished_requests_only():
    told = []

    def learn(request, report):
        told.append((request.request_id, report.kept_tokens))

    rig = Rig(learn, fails=[None, DecodeUnavailable("gone"), DecodeUnavailable("gone")])
    assert await rig.run()
    with pytest.raises(DecodeUnavailable):
        await rig.run()
    assert told == [("r", 20)]
