"""Pruned prompts whose answer the main model is unsure of are prefilled again, dense."""

import asyncio
from contextlib import aclosing, nullcontext
from dataclasses import replace

import pytest

from specprefill.core.errors import DeadlineExceeded, Overloaded, PrefillUnavailable
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator, PlannedPipeline
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Controls, Plan, PlanKind, PromptMode, Reason, Request

PROMPT = tuple(range(100, 200))


class Local:
    """Decode computes every prompt; or, with `dense` False, none that is dense."""

    def __init__(self, dense=True):
        self.dense = dense

    def decide(self, request, selection):
        return nullcontext(self.dense or selection.kept_tokens < selection.prompt_tokens)

    def learn(self, request, selection, report, token_ids):
        pass


class Pools:
    def __init__(self, sureness=(), decoded=(), below=0.5, **pipeline):
        self.now_s = 0.0
        self.prefiller = FakePrefiller(sureness=list(sureness))
        self.decoder = FakeDecoder(sureness=list(decoded))
        made = Pipeline(
            FakeSpeculator(), self.prefiller, self.decoder,
            recompute_below=below, now=self.now, **pipeline,
        )  # fmt: skip
        planner = Planner(enabled=True, keep=0.2, min_prompt_tokens=50)
        self.pipeline = PlannedPipeline(made, planner)

    def now(self):
        self.now_s += 0.001
        return self.now_s

    async def run(self, **fields):
        request = Request("r", PROMPT, b"", **fields)
        chunks = [chunk async for chunk in self.pipeline.generate(request)]
        return [token for chunk in chunks for token in chunk.token_ids], chunks[-1].report

    @property
    def prefilled(self):
        return [selection.kept_tokens for selection in self.prefiller.selections]


@pytest.mark.parametrize("early", [False, True])
async def test_an_unsure_answer_is_computed_again_from_all_of_the_prompt(early):
    pools = Pools(sureness=[0.4])
    pools.prefiller.early = early
    tokens, report = await pools.run()
    assert tokens == [100, 101, 102, 103]  # each once
    assert pools.prefilled == [20, 100]
    assert (report.plan, report.reason) == (PlanKind.DENSE, Reason.UNSURE_ANSWER)
    assert (report.kept_tokens, report.speculate_s) == (100, 0.25)
    assert 0 < report.discarded_s < report.ttft_s
    assert (pools.prefiller.held, pools.prefiller.released) == (0, 2)
    assert pools.prefiller.most_held == 1  # all of the prompt may need the room
    assert pools.decoder.closed == len(pools.decoder.replays) == 1 + early


async def test_the_first_token_behind_two_prefills_shows_nobodys_queue():
    for sureness, is_late in ((0.4, True), (0.6, False)):
        stream = Pools(sureness=[sureness]).pipeline.generate(Request("r", PROMPT, b""))
        async with aclosing(stream) as chunks:
            assert (await anext(chunks)).late_by_itself is is_late


async def test_a_sure_answer_is_sent():
    pools = Pools(sureness=[0.5])
    _, report = await pools.run()
    assert pools.prefilled == [20]
    assert (report.reason, report.discarded_s) == (Reason.DEFAULT, 0.0)


async def test_by_default_no_engine_is_asked():
    pools = Pools(below=0.0)  # the fakes know no sureness to report
    _, report = await pools.run()
    assert (pools.prefilled, report.plan) == ([20], PlanKind.PRUNE)


async def test_a_dense_prompt_is_not_asked_about():
    pools = Pools()
    _, report = await pools.run(controls=Controls(prune=False))
    assert (pools.prefilled, report.reason) == ([100], Reason.ASKED_OFF)


async def test_a_prompt_without_room_for_all_of_it_is_answered_as_it_was_cut():
    pools = Pools(max_model_len=100)
    _, report = await pools.run()
    assert (pools.prefilled, report.plan) == ([20], PlanKind.PRUNE)


@pytest.mark.parametrize(
    "error", [Overloaded("full"), DeadlineExceeded("late"), PrefillUnavailable("gone")]
)
async def test_where_all_of_it_cannot_be_computed_the_pruned_prompt_is_answered(error):
    pools = Pools(sureness=[0.4])
    pools.prefiller.fails = [None, error]
    tokens, report = await pools.run()
    assert tokens == [100, 101, 102, 103]
    assert pools.prefilled == [20, 100, 20]
    assert (report.plan, report.reason) == (PlanKind.PRUNE, Reason.DEFAULT)
    assert 0 < report.discarded_s < report.ttft_s
    assert report.retries == isinstance(error, PrefillUnavailable)  # one engine, not four
    assert pools.prefiller.held == 0


async def test_all_of_it_has_half_of_the_time_that_is_left():
    pools = Pools(sureness=[0.4])
    pools.prefiller.hangs = [1]
    tokens, report = await pools.run(timeout_s=0.4)
    assert tokens == [100, 101, 102, 103]
    assert (pools.prefilled, report.plan) == ([20, 100, 20], PlanKind.PRUNE)


async def test_a_client_that_leaves_while_all_of_it_is_computed_releases_everything():
    pools = Pools(sureness=[0.4])
    pools.prefiller.early, pools.prefiller.hangs = True, [1]
    running = asyncio.create_task(pools.run())
    await pools.prefiller.hung.wait()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert pools.prefilled == [20, 100]
    assert pools.prefiller.held == 0
    assert pools.decoder.closed == len(pools.decoder.replays)


@pytest.mark.parametrize("reason", [Reason.LOAD, Reason.AUTO, Reason.CARRIED_OVER])
async def test_nothing_is_computed_again_under_load(reason):
    pools = Pools(sureness=[0.4])
    plan = Plan(PlanKind.PRUNE, reason, 0.2, lowered=True)
    _, report = await pools.run(plan=plan)
    assert (pools.prefilled, report.reason) == ([20], reason)


async def test_nothing_is_computed_again_where_nothing_was_scored():
    pools = Pools(sureness=[0.4])
    plan = Plan(PlanKind.PRUNE, Reason.SPECULATOR_TIMEOUT, 0.2)
    _, report = await pools.run(plan=plan)
    assert (pools.prefilled, report.reason) == ([20], Reason.SPECULATOR_TIMEOUT)


@pytest.mark.parametrize(("longest", "again"), [(None, True), (202, True), (200, False)])
async def test_in_text_mode_half_of_the_room_is_the_answers(longest, again):
    class Texts:
        async def write(self, request, selection):
            return replace(selection, text=tuple(selection.engine_prompt(request.prompt)))

    pools = Pools(sureness=[0.4], texts=Texts(), max_model_len=longest)
    _, report = await pools.run(controls=Controls(keep=0.2, mode=PromptMode.TEXT))
    assert (report.reason is Reason.UNSURE_ANSWER) == again


async def test_an_engine_that_dies_first_is_replaced_and_asked_too():
    pools = Pools(sureness=[0.4, 0.4])
    pools.prefiller.fails = [PrefillUnavailable("gone")]
    _, report = await pools.run()
    assert (report.reason, report.retries) == (Reason.UNSURE_ANSWER, 1)


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("samples", [1, 2])
async def test_what_decode_computes_itself_is_asked_about_too(dense, samples):
    pools = Pools(decoded=[0.4], local=Local(dense))
    tokens, report = await pools.run(samples=samples)
    assert tokens == [100, 101, 102, 103] * samples
    assert report.reason is Reason.UNSURE_ANSWER
    assert pools.prefilled == ([] if dense else [100])
    assert pools.decoder.closed == len(pools.decoder.replays) == 2


async def test_what_decode_computes_itself_is_sent_where_it_is_sure():
    pools = Pools(decoded=[0.9], local=Local())
    tokens, report = await pools.run()
    assert tokens == [100, 101, 102, 103]
    assert report.plan is PlanKind.PRUNE
    assert len(pools.decoder.replays) == 1


async def test_a_client_that_leaves_releases_both():
    pools = Pools(sureness=[0.4])
    pools.prefiller.early = True
    async with aclosing(pools.pipeline.generate(Request("r", PROMPT, b""))) as stream:
        await anext(stream)
    assert pools.prefiller.held == 0
    assert pools.decoder.closed == len(pools.decoder.replays)
