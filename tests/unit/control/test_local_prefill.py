"""The prompts that decode computes itself, and the pipeline's answers to them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest

from specprefill.control.local_prefill import LocalPrefillRule
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.errors import DecodeUnavailable
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import (
    Controls,
    Plan,
    PlanKind,
    PrefilledBy,
    Reason,
    Request,
    Selection,
    Span,
    dense_selection,
)

# A token takes a millisecond to compute; taking KV over takes 50.
CURVES = StageCurves(
    speculate=Curve(),
    prefill=Curve(token_s=0.001),
    transfer=Curve(base_s=0.02),
    first_decode=Curve(base_s=0.03),
)
PROMPT = tuple(range(100, 200))


def request(tokens=100, **fields):
    return Request("r", PROMPT[:tokens], b"", **fields)


def local(asked, selection=None, max_tokens=100, running=0):
    rule = LocalPrefillRule(max_tokens, lambda: CURVES)
    selection = selection or dense_selection(len(asked.prompt), Reason.SHORT_PROMPT)
    with ExitStack() as others:
        for _ in range(running):
            others.enter_context(rule.decide(request(1), dense_selection(1, Reason.SHORT_PROMPT)))
        return others.enter_context(rule.decide(asked, selection))


def test_a_short_dense_prompt_is():
    assert local(request())


def test_a_longer_one_is_not():
    assert not local(request(), max_tokens=99)


def test_a_pruned_one_is_not():
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.2)
    assert not local(request(), Selection(100, (Span(0, 20),), plan))


def test_several_samples_would_each_compute_it():
    assert not local(request(samples=2))


def test_logprobs_of_the_prompt_are_the_prefill_pools():
    assert not local(request(prompt_logprobs=True))


@pytest.mark.parametrize(("tokens", "decided"), [(50, True), (51, False)])
def test_beside_other_answers_only_prompts_no_slower_than_a_hand_over(tokens, decided):
    assert local(request(tokens), running=1) is decided


def test_a_request_counts_while_it_runs():
    rule = LocalPrefillRule(100, lambda: CURVES)
    whole = dense_selection(100, Reason.SHORT_PROMPT)
    with rule.decide(request(), whole) as first, rule.decide(request(), whole) as second:
        assert (first, second) == (True, False)
    with rule.decide(request(), whole) as third:
        assert third


class TestPipeline:
    @staticmethod
    async def run(asked, **decoder):
        prefiller, decoder = FakePrefiller(), FakeDecoder(**decoder)
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=1000)
        rule = LocalPrefillRule(100, lambda: CURVES)
        pipeline = Pipeline(FakeSpeculator(), prefiller, decoder, local=rule)
        chunks = [chunk async for chunk in pipeline.generate(planner.with_plan(asked))]
        return chunks, prefiller, decoder

    async def test_the_prefill_pool_is_not_asked(self):
        chunks, prefiller, decoder = await self.run(request())
        assert [token for chunk in chunks for token in chunk.token_ids] == [100, 101, 102, 103]
        assert prefiller.selections == []
        assert decoder.replays == [((),)]

    async def test_the_report_names_the_pool(self):
        chunks, _, _ = await self.run(request())
        report = chunks[-1].report
        assert (report.prefilled_by, report.prefill_s) == (PrefilledBy.DECODE, 0.375)
        assert (report.transfer_s, report.first_decode_s) == (0.0, 0.0)
        assert (report.plan, report.reason) == (PlanKind.DENSE, Reason.SHORT_PROMPT)
        assert not report.recomputed

    async def test_other_prompts_go_through_the_prefill_pool(self):
        chunks, prefiller, _ = await self.run(request(controls=Controls(keep=0.2)))
        assert chunks[-1].report.prefilled_by is PrefilledBy.PREFILL
        assert len(prefiller.selections) == 1

    @pytest.mark.parametrize("place", range(4))
    async def test_a_lost_decode_engine_is_replaced(self, place):
        chunks, _, decoder = await self.run(
            request(), fails=[DecodeUnavailable("gone")], fails_at=place
        )
        assert [token for chunk in chunks for token in chunk.token_ids] == [100, 101, 102, 103]
        assert decoder.replays == [((),), (PROMPT[:place],)]

    async def test_a_stop_string_holds_nothing_back_twice(self):
        chunks, _, _ = await self.run(replace(request(), hold_back_chars=3))
        assert [token for chunk in chunks for token in chunk.token_ids] == [100, 101, 102, 103]
