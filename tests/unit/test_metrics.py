"""The pipeline's metrics."""

import pytest

from specprefill.errors import DecodeUnavailable
from specprefill.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.gateway import metrics
from specprefill.pipeline import Pipeline
from specprefill.plan import Planner
from specprefill.types import Controls, Request


def measured(**decoder):
    planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
    pipeline = Pipeline(FakeSpeculator(), FakePrefiller(), FakeDecoder(**decoder), planner)
    return metrics.MeasuredPipeline(pipeline)


def count(outcome, plan="", reason=""):
    return metrics.REQUESTS.labels(outcome, plan, reason)._value.get()


REQUEST = Request("r", tuple(range(100, 200)), b"", controls=Controls(keep=0.2))


async def test_an_answer_is_counted_with_its_plan_and_its_tokens():
    before = count("answered", "prune", "asked"), metrics.KEPT_TOKENS._value.get()
    chunks = [chunk async for chunk in measured().generate(REQUEST)]
    assert chunks[-1].report is not None
    after = count("answered", "prune", "asked"), metrics.KEPT_TOKENS._value.get()
    assert (after[0] - before[0], after[1] - before[1]) == (1, 20)


async def test_a_failure_is_counted_by_its_name():
    before = count("DecodeUnavailable")
    with pytest.raises(DecodeUnavailable):
        async for _ in measured(fails=[DecodeUnavailable("gone")] * 2).generate(REQUEST):
            pass
    assert count("DecodeUnavailable") - before == 1


async def test_a_client_that_leaves_is_no_failure():
    before = count("client_closed")
    stream = measured().generate(REQUEST)
    await anext(stream)
    await stream.aclose()
    assert count("client_closed") - before == 1


async def test_who_learns_is_told_of_finished_requests_only():
    told = []

    def learn(request, report):
        told.append((request.request_id, report.kept_tokens))

    planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
    decoder = FakeDecoder(fails=[None, DecodeUnavailable("gone"), DecodeUnavailable("gone")])
    inside = Pipeline(FakeSpeculator(), FakePrefiller(), decoder, planner)
    pipeline = metrics.MeasuredPipeline(inside, learn)
    assert [chunk async for chunk in pipeline.generate(REQUEST)]
    with pytest.raises(DecodeUnavailable):
        assert [chunk async for chunk in pipeline.generate(REQUEST)]
    assert told == [("r", 20)]
