"""The signals of gateways and pools to the autoscaler."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from specprefill.autoscaling.signals import (
    CACHED_SHARE,
    OUTPUT_TOKEN_S,
    arrivals_in,
    curves_in,
    size,
)
from specprefill.autoscaling.waiting import Waiting
from specprefill.control.stages import DEFAULT_CURVES
from specprefill.core.fakes import PlannedPipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Chunk, PlanKind, Reason, Report, Request
from specprefill.gateway.observe.traffic import ArrivalCounts, GatewayTraffic
from specprefill.gateway.observe.watched import ObservedPipeline
from tests.policies import PAPER

POLICY = replace(PAPER, chunk_tokens=1, min_kept_tokens=300, sink_tokens=0, tail_tokens=0)
REPORT = Report(PlanKind.PRUNE, Reason.DEFAULT, 4000, 1000, 0.25, 0, 0, 0, 0, 0, 0.1, False, 500)


class Clock:
    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


class Pipeline:
    """Answers three tokens, a second each; or fails after the first."""

    def __init__(self, clock, failure=None, report=REPORT):
        self._clock, self._failure, self._report = clock, failure, report

    async def generate(self, request):
        yield Chunk(0, (1,), "a")
        if self._failure is not None:
            raise self._failure
        self._clock.now_s += 2.0
        yield Chunk(0, (2, 3), "b", finish_reason="stop", report=self._report)

    async def select(self, request):
        return request


def counted(failure=None, keep=0.25, report=REPORT):
    clock, traffic = Clock(), GatewayTraffic()
    planner = Planner(enabled=True, keep=keep, min_prompt_tokens=1000)
    watched = ObservedPipeline(
        Pipeline(clock, failure, report), [ArrivalCounts(traffic, POLICY, clock)]
    )
    return PlannedPipeline(watched, planner), traffic


def arrivals(traffic):
    return arrivals_in(traffic.signals(DEFAULT_CURVES))


@pytest.mark.parametrize(
    ("tokens", "kept"), [(4000, 1000), (1100, 300), (900, 900)], ids=["rate", "floor", "dense"]
)
async def test_an_arrival_is_counted_before_it_is_answered(tokens, kept):
    pipeline, traffic = counted()
    stream = pipeline.generate(Request("r", tuple(range(tokens)), b""))
    await anext(stream)
    (found,) = arrivals(traffic)
    assert found == size(tokens, kept, found.output_tokens)
    await stream.aclose()


async def test_averages_follow_the_answers():
    pipeline, traffic = counted()
    for _ in range(300):
        chunks = [c async for c in pipeline.generate(Request("r", tuple(range(4000)), b""))]
        assert [chunk.text for chunk in chunks] == ["a", "b"]
    signals = traffic.signals(DEFAULT_CURVES)
    assert signals[OUTPUT_TOKEN_S] == pytest.approx(1.0, rel=0.01)  # 2 s for two tokens
    assert signals[CACHED_SHARE] == pytest.approx(0.5, rel=0.01)
    assert curves_in(signals) == DEFAULT_CURVES
    newest = min(arrivals(traffic), key=lambda each: each.output_tokens)
    assert newest.output_tokens == 3
    assert arrivals(traffic).total() == 300


async def test_a_token_of_several_samples_takes_a_slot_of_each():
    pipeline, traffic = counted()
    for _ in range(300):
        asked = Request("r", tuple(range(4000)), b"", samples=2)
        _ = [chunk async for chunk in pipeline.generate(asked)]
    # Three tokens, two of them first ones: the third took both slots for 2 s.
    assert traffic.signals(DEFAULT_CURVES)[OUTPUT_TOKEN_S] == pytest.approx(4.0, rel=0.01)


async def test_where_the_scores_choose_what_they_usually_keep_is_expected():
    pipeline, traffic = counted(keep=None)
    prompt = tuple(range(4000))
    for _ in range(300):
        _ = [chunk async for chunk in pipeline.generate(Request("r", prompt, b""))]
    newest = min(arrivals(traffic), key=lambda each: each.output_tokens)
    assert newest.kept_tokens == size(4000, REPORT.keep_rate * 4000, 3).kept_tokens


@pytest.mark.parametrize(("share", "kept"), [(0.5, 3000), (1.0, 3999)])
async def test_prompts_that_are_prefilled_again_count_for_both(share, kept):
    pipeline, traffic = counted()
    traffic.unsure_share = share
    stream = pipeline.generate(Request("r", tuple(range(4000)), b""))
    await anext(stream)
    (found,) = arrivals(traffic)
    assert found.kept_tokens == size(4000, kept, 3).kept_tokens
    await stream.aclose()


async def test_how_many_are_prefilled_again_follows_the_answers():
    again = replace(REPORT, plan=PlanKind.DENSE, reason=Reason.UNSURE_ANSWER, keep_rate=1.0)
    pipeline, traffic = counted(report=again)
    for _ in range(300):
        _ = [chunk async for chunk in pipeline.generate(Request("r", tuple(range(4000)), b""))]
    assert traffic.unsure_share == pytest.approx(1.0, rel=0.01)
    assert traffic.keep_rate == GatewayTraffic().keep_rate  # not what pruned prompts keep


async def test_a_failed_request_was_an_arrival_too():
    pipeline, traffic = counted(failure=ValueError("no"))
    with pytest.raises(ValueError, match="no"):
        _ = [chunk async for chunk in pipeline.generate(Request("r", (1,), b""))]
    assert arrivals(traffic).total() == 1


async def test_selecting_asks_the_pipeline_inside():
    request = SimpleNamespace()
    assert await ObservedPipeline(Pipeline(Clock()), []).select(request) is request


def test_waiting_is_being_behind_another_request():
    clock = Clock()
    waiting = Waiting(clock)
    assert waiting.oldest_s() == 0.0
    with waiting.track():
        clock.now_s += 5.0
        assert waiting.oldest_s() == 0.0  # it is being computed
        with waiting.track():
            clock.now_s += 2.0
            assert waiting.oldest_s() == 2.0
        assert waiting.oldest_s() == 0.0
