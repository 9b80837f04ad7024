"""The prompts that decode computes itself, and the pipeline's answers to them."""

from contextlib import ExitStack
from dataclasses import replace

import pytest
from msgspec import structs

from specprefill.control.decode_caches import DecodeCaches
from specprefill.control.local_prefill import EveryPromptLocal, LocalLimits, LocalPrefillRule
from specprefill.control.probe import PrefillByDecoder
from specprefill.control.stages import Curve, StageCurves, StageModels
from specprefill.core.errors import DecodeUnavailable, PrefillUnavailable
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
from specprefill.prefill.idle import IdlePrefill

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


def rule_of(prompt_tokens=100, turn_tokens=0):
    limits = LocalLimits(prompt_tokens, turn_tokens)
    return LocalPrefillRule(limits, lambda: CURVES, DecodeCaches(1000))


def local(asked, selection=None, max_tokens=100, running=0, turn_tokens=0):
    rule = rule_of(max_tokens, turn_tokens)
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


@pytest.mark.parametrize(
    ("carried", "turn_tokens", "running", "decided"),
    [
        (60, 40, 0, True),
        (60, 39, 0, False),
        (40, 60, 0, False),
        (60, 40, 1, True),
        (49, 51, 1, False),
    ],
)
def test_the_next_turn_is_where_decode_has_most_of_it(carried, turn_tokens, running, decided):
    plan = Plan(PlanKind.PRUNE, Reason.CARRIED_OVER, 0.2)
    turn = Selection(200, (Span(0, 50), Span(150, 200)), plan, carried_tokens=carried)
    assert local(request(), turn, turn_tokens=turn_tokens, running=running) is decided


def test_several_samples_would_each_compute_it():
    assert not local(request(samples=2))


def test_logprobs_of_the_prompt_are_the_prefill_pools():
    assert not local(request(prompt_logprobs=True))


@pytest.mark.parametrize(("tokens", "decided"), [(50, True), (51, False)])
def test_beside_other_answers_only_prompts_no_slower_than_a_hand_over(tokens, decided):
    assert local(request(tokens), running=1) is decided


def test_a_request_counts_while_it_runs():
    rule = rule_of()
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
        rule = rule_of()
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


class TestWithoutHandOver:
    """The model's KV cannot be handed over: decode computes every prompt."""

    @staticmethod
    async def run(asked, **decoder):
        prefiller, decoder = FakePrefiller(), FakeDecoder(**decoder)
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=10)
        rule = EveryPromptLocal()
        pipeline = Pipeline(FakeSpeculator(), prefiller, decoder, local=rule)
        chunks = [chunk async for chunk in pipeline.generate(planner.with_plan(asked))]
        assert prefiller.selections == []
        return chunks

    async def test_pruned_prompts_too(self):
        chunks = await self.run(request(controls=Controls(keep=0.2)))
        report = chunks[-1].report
        assert (report.plan, report.prefilled_by) == (PlanKind.PRUNE, PrefilledBy.DECODE)
        assert report.prefill_s == 0.375

    async def test_several_samples_too(self):
        chunks = await self.run(request(samples=3))
        for index in range(3):
            found = [t for chunk in chunks if chunk.index == index for t in chunk.token_ids]
            assert found == [100, 101, 102, 103]

    async def test_logprobs_of_the_prompt_come_from_decode(self):
        class Decoder(FakeDecoder):
            async def decode(self, *args):
                first = True
                async for step in super().decode(*args):
                    logprobs = (None, None) if first else None
                    chunk = structs.replace(step.chunk, prompt_logprobs=logprobs)
                    yield structs.replace(step, chunk=chunk)
                    first = False

        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=10)
        rule = EveryPromptLocal()
        pipeline = Pipeline(FakeSpeculator(), FakePrefiller(), Decoder(), local=rule)
        asked = planner.with_plan(request(prompt_logprobs=True))
        chunks = [chunk async for chunk in pipeline.generate(asked)]
        assert [chunk.prompt_logprobs for chunk in chunks] == [(None, None), None, None, None]

    async def test_the_time_of_decode_s_prefills_is_learnt(self):
        models = StageModels(hands_over=False)
        chunks = await self.run(request())
        models.observe(chunks[-1].report)
        assert models.prefill.samples_seen == 1
        assert models.transfer.samples_seen == models.first_decode.samples_seen == 0

    async def test_the_first_measurement_is_of_a_prefill_by_decode(self):
        asked = request()
        selection = dense_selection(len(asked.prompt), Reason.ASKED_OFF)
        prefiller = PrefillByDecoder(FakeDecoder(max_tokens=1))
        async with prefiller.prefill(asked, selection, 1.0) as prefilling:
            assert await prefilling.ticket() is None
            found = await prefilling.result()
            prefilling.kv_arrived()
        assert (found.first.token_ids, found.prefill_s) == ((100,), 0.375)

    async def test_the_prefill_pool_stands_by(self):
        idle = IdlePrefill()
        selection = dense_selection(1, Reason.ASKED_OFF)
        with pytest.raises(PrefillUnavailable, match="cannot be handed over"):
            await anext(idle.steps(request(), selection, 1.0))
        assert await idle.drain(1.0)
        assert await idle.gauges() == []
