"""The service around the scorer: batches, cancellation, deadlines, overload, ways out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch

from specprefill.core.chunks import Chunks
from specprefill.core.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    ScoringTimeout,
    SpeculatorUnavailable,
    UnsupportedModel,
)
from specprefill.core.positions import PositionMap
from specprefill.core.selection import chunk_scores, select
from specprefill.core.types import Controls, Plan, PlanKind, Reason, Request, Selection, Span
from specprefill.core.wire import pack, unpack
from specprefill.speculator.chunking import Chunker
from specprefill.speculator.draft import Draft
from specprefill.speculator.jobs import Batching, Pace
from specprefill.speculator.method import Queries, Reduction, ScoringMethod
from specprefill.speculator.passes import MAX_FAILURES_IN_A_ROW
from specprefill.speculator.reading import Reading
from specprefill.speculator.scorer import Scorer
from specprefill.speculator.scoring_gauges import SpeculatorGauges
from specprefill.speculator.service import SpeculatorService
from specprefill.speculator.translation import SamePrompt
from tests.instruments import Instruments
from tests.unit.speculator.gated_scorer import (
    PLAN,
    POLICY,
    VOCABULARY,
    WAIT_S,
    GatedScorer,
    request_of,
    serving,
)

NAME = "specprefill_speculator"


@pytest.mark.asyncio
async def test_a_request_gets_the_selection_of_its_scores_and_its_times(
    scorer: GatedScorer,
) -> None:
    request = request_of(200, protected=(Span(50, 53),))
    async with serving(scorer) as service:
        selection = await service.select(request, PLAN, WAIT_S)
    expected = select(scorer.score([request.prompt])[0], PLAN, request.protected, POLICY)
    assert selection.runs == expected.runs
    assert selection.plan == PLAN
    assert selection.speculate_s > 0
    assert 0 <= selection.queue_s < WAIT_S


@pytest.mark.asyncio
async def test_a_draft_asked_by_the_question_alone_serves_repeats_and_turns(draft: Draft) -> None:
    method = ScoringMethod({0: (1,)}, Reduction.MEAN, Queries.QUESTION)
    scorer = Scorer(draft.up_to(0), 4, 16, pool_tokens=13, method=method)
    first = request_of(300)
    turn = replace(first, prompt=(*first.prompt, *request_of(90).prompt))
    async with serving(scorer) as service:
        found = [await service.select(each, PLAN, WAIT_S) for each in (first, first, turn)]
    alone = Scorer(draft.up_to(0), 4, 16, pool_tokens=13, method=method)
    for request, selection in zip((first, first), found[:2], strict=True):
        expected = select(alone.score([request.prompt])[0], PLAN, (), POLICY, 0.0)
        assert selection.runs == expected.runs
    assert found[1].remembered_tokens == 300
    assert found[2].remembered_tokens == 256  # whole blocks of 64
    assert found[2].prompt_tokens == 390


class PeakedScorer(GatedScorer):
    """A scorer that finds the same chunk of every prompt important."""

    def rate(self, reading: Reading) -> np.ndarray:
        scores = np.random.default_rng(0).uniform(0.01, 0.02, len(reading.prompt))
        scores[80:88] = 1.0
        return scores.astype(np.float32)


@pytest.mark.asyncio
async def test_the_next_turn_keeps_what_the_last_one_kept(draft: Draft) -> None:
    plan = replace(PLAN, reason=Reason.DEFAULT)
    first = request_of(400)
    turn = replace(first, prompt=(*first.prompt, *first.prompt[:20]))
    async with serving(PeakedScorer(draft)) as service:
        before = await service.select(first, plan, WAIT_S)
        after = await service.select(turn, plan, WAIT_S)
        anew = await service.select(turn, replace(plan, reason=Reason.ASKED, keep=0.6), WAIT_S)
    assert after.plan.reason is Reason.CARRIED_OVER
    assert after.carried_tokens == before.kept_tokens
    earlier, later = (PositionMap.from_runs(each.runs, 420).kept for each in (before, after))
    assert later[: len(earlier)].tolist() == earlier.tolist()
    assert later[-20:].tolist() == list(range(400, 420))
    assert (anew.plan.reason, anew.carried_tokens) == (Reason.RESELECTED, 0)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("keep", "controls", "reason"),
    [
        (0.3, Controls(), Reason.CARRIED_OVER),
        (0.3, Controls(floor=0.2, ceiling=0.5), Reason.CARRIED_OVER),
        (0.6, Controls(floor=0.6), Reason.RESELECTED),
        (0.1, Controls(ceiling=0.1), Reason.RESELECTED),
    ],
)
async def test_a_turn_keeps_within_its_callers_bounds(
    draft: Draft, keep: float, controls: Controls, reason: Reason
) -> None:
    plan = replace(PLAN, reason=Reason.DEFAULT)
    first = request_of(400)
    turn = replace(first, prompt=(*first.prompt, *first.prompt[:20]), controls=controls)
    async with serving(PeakedScorer(draft)) as service:
        await service.select(first, plan, WAIT_S)
        after = await service.select(turn, replace(plan, keep=keep), WAIT_S)
    assert after.plan.reason is reason


@pytest.mark.asyncio
async def test_an_echo_takes_no_more_memory_than_there_is(draft: Draft) -> None:
    tokens = 200
    for places in range(tokens + 3, tokens + 70, 11):  # 3 are generated
        scorer = GatedScorer(draft, places * draft.layout.bytes_per_token)
        asked = replace(request_of(tokens), asked=(Span(10, 90),))
        async with serving(scorer) as service:
            selection = await service.select(asked, PLAN, WAIT_S)
        assert selection.plan == PLAN
        (reading,) = scorer.seen
        assert len(reading.echo) == min(64, places - tokens)


@pytest.mark.asyncio
async def test_without_carry_over_each_turn_is_selected_by_itself(scorer: GatedScorer) -> None:
    plan = replace(PLAN, reason=Reason.DEFAULT)
    first = request_of(400)
    turn = replace(first, prompt=(*first.prompt, *first.prompt[:20]))
    policy = replace(POLICY, carry_over=False)
    async with serving(scorer) as service:
        await service.select(first, plan, WAIT_S, policy)
        after = await service.select(turn, plan, WAIT_S, policy)
    assert after.plan == plan


@pytest.mark.asyncio
async def test_a_selection_carries_its_scores_where_they_are_wanted(scorer: GatedScorer) -> None:
    request = request_of(200, protected=(Span(50, 53),))
    async with serving(scorer) as service:
        plain = await service.select(request, PLAN, WAIT_S)
        wanted = await service.select(replace(request, wants_scores=True), PLAN, WAIT_S)
    scores = scorer.score([request.prompt])[0]
    assert plain.scores is None
    assert wanted.runs == plain.runs
    assert wanted.scores == chunk_scores(scores, request.protected, POLICY, wanted.scores.certainty)
    assert unpack(pack(wanted), Selection) == wanted


class UnreadScorer(GatedScorer):
    """A scorer whose draft has no tokens for prompts of 100."""

    def translate(self, prompt: Sequence[int]) -> SamePrompt:
        return SamePrompt(() if len(prompt) == 100 else tuple(prompt))


@pytest.mark.asyncio
async def test_a_prompt_that_the_draft_cannot_read_goes_dense_and_harms_no_other(
    draft: Draft,
) -> None:
    async with serving(UnreadScorer(draft)) as service:
        for _ in range(MAX_FAILURES_IN_A_ROW + 1):
            read, unread = await asyncio.gather(
                *(service.select(request_of(tokens), PLAN, WAIT_S) for tokens in (170, 100))
            )
            assert read.plan.kind is PlanKind.PRUNE
            assert (unread.plan.kind, unread.plan.reason) == (PlanKind.DENSE, Reason.FLAT_SCORES)
        assert service.is_running
        assert service.counts.failures == 0


@pytest.mark.asyncio
async def test_prompts_whose_callers_left_are_not_cut_any_more(draft: Draft) -> None:
    cut: list[int] = []
    first_is_cut, go_on = threading.Event(), threading.Event()

    class SlowChunker:
        def chunks(self, prompt: Sequence[int]) -> Chunks:
            cut.append(len(prompt))
            first_is_cut.set()
            assert go_on.wait(WAIT_S)
            return Chunks.of_equal_length(len(prompt), 8)

    chosen = Batching(max_wait_s=0.05)
    scorer = GatedScorer(draft)
    service = SpeculatorService(lambda: scorer, POLICY, chosen, load_chunks=SlowChunker)
    async with service:
        asked = [
            asyncio.create_task(service.select(request_of(tokens), PLAN, WAIT_S))
            for tokens in (100, 110, 120, 130)
        ]
        assert await asyncio.to_thread(first_is_cut.wait, WAIT_S)
        for task in asked[1:3]:
            task.cancel()
        await asyncio.wait(asked[1:3])
        go_on.set()
        await asyncio.gather(asked[0], asked[3])
    assert cut == [100, 130]


@pytest.mark.asyncio
async def test_concurrent_requests_share_a_batch_and_get_their_own_answers(
    scorer: GatedScorer,
) -> None:
    requests = [request_of(tokens) for tokens in (100, 170, 64)]
    async with serving(scorer) as service:
        selections = await asyncio.gather(
            *(service.select(request, PLAN, WAIT_S) for request in requests)
        )
    assert scorer.batches == [3]
    for request, selection in zip(requests, selections, strict=True):
        (scores,) = scorer.score([request.prompt])
        assert selection.runs == select(scores, PLAN, (), POLICY).runs


@pytest.mark.asyncio
async def test_a_batch_is_not_larger_than_allowed(scorer: GatedScorer) -> None:
    batching = Batching(max_batch=2, max_wait_s=0.05)
    async with serving(scorer, batching) as service:
        await asyncio.gather(
            *(service.select(request_of(40 + extra), PLAN, WAIT_S) for extra in range(5))
        )
    assert max(scorer.batches) <= 2
    assert sum(scorer.batches) == 5


def test_the_pace_follows_measurements() -> None:
    first = Pace().with_reading(1.0).with_look_ahead(2.0)
    assert first == Pace(1.0, 2.0)
    second = first.with_reading(2.0).with_look_ahead(2.0)
    assert second.token_s == pytest.approx(1.2)
    assert second.look_ahead_s == pytest.approx(2.0)


@pytest.mark.asyncio
async def test_a_short_prompt_overtakes_the_rest_of_a_long_one(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    async with serving(scorer, Batching()) as service:
        service._passes.pace = Pace(token_s=1.0, look_ahead_s=0.0)  # nobody waits for anybody
        long = asyncio.create_task(service.select(request_of(500), PLAN, WAIT_S))
        await scorer.wait_until_held()
        short = [
            asyncio.create_task(service.select(request_of(tokens), PLAN, WAIT_S))
            for tokens in (60, 40)
        ]
        await asyncio.sleep(0)
        scorer.gate.set()
        answers = await asyncio.gather(long, *short)
    assert scorer.finished == [40, 60, 500]
    (worked, waited) = answers[0].speculate_s, answers[0].queue_s
    assert waited > 0  # behind the others
    assert worked > answers[1].speculate_s


@pytest.mark.asyncio
async def test_a_turn_counts_by_what_is_new_in_it(scorer: GatedScorer) -> None:
    document = request_of(400)
    turn = replace(document, prompt=(*document.prompt, *request_of(20).prompt))
    async with serving(scorer, Batching()) as service:
        await service.select(document, PLAN, WAIT_S)
        service._passes.pace = Pace(token_s=1.0, look_ahead_s=0.0)
        scorer.gate.clear()
        scorer.entered.clear()
        first = asyncio.create_task(service.select(request_of(300), PLAN, WAIT_S))
        await scorer.wait_until_held()
        both = [
            asyncio.create_task(service.select(each, PLAN, WAIT_S))
            for each in (request_of(90), turn)
        ]
        await asyncio.sleep(0)
        scorer.gate.set()
        await asyncio.gather(first, *both)
    assert scorer.finished == [400, 420, 90, 300]


@pytest.mark.asyncio
async def test_a_cancelled_request_is_dropped_between_chunks(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    async with serving(scorer) as service:
        task = asyncio.create_task(service.select(request_of(300), PLAN, WAIT_S))
        await scorer.wait_until_held()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        scorer.gate.set()
        selection = await service.select(request_of(80), PLAN, WAIT_S)
    assert selection.prompt_tokens == 80
    assert scorer.finished == [80]


@pytest.mark.asyncio
async def test_a_request_cancelled_in_the_queue_is_never_scored(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    async with serving(scorer) as service:
        first = asyncio.create_task(service.select(request_of(90), PLAN, WAIT_S))
        await scorer.wait_until_held()
        queued = asyncio.create_task(service.select(request_of(300), PLAN, WAIT_S))
        await asyncio.sleep(0)
        queued.cancel()
        scorer.gate.set()
        await first
        await service.select(request_of(80), PLAN, WAIT_S)
    assert scorer.finished == [90, 80]


@pytest.mark.asyncio
async def test_a_deadline_ends_the_wait_and_the_work(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    async with serving(scorer) as service:
        with pytest.raises(DeadlineExceeded):
            await service.select(request_of(300), PLAN, 0.05)
        scorer.gate.set()
        await service.select(request_of(80), PLAN, WAIT_S)
    assert scorer.finished == [80]


@pytest.mark.asyncio
async def test_a_time_out_reports_whether_the_time_was_waited_or_scored(
    scorer: GatedScorer,
) -> None:
    scorer.gate.clear()
    async with serving(scorer, Batching(max_batch=1)) as service:
        first = asyncio.create_task(service.select(request_of(90), PLAN, 2.0))
        await scorer.wait_until_held()
        behind = asyncio.create_task(service.select(request_of(70), PLAN, 2.0))
        scored, waited = await asyncio.gather(first, behind, return_exceptions=True)
        scorer.gate.set()
    assert isinstance(scored, ScoringTimeout)
    assert isinstance(waited, ScoringTimeout)
    assert scored.speculate_s > 1.0 > scored.queue_s
    assert waited.queue_s >= 2.0
    assert waited.speculate_s == 0.0


@pytest.mark.asyncio
async def test_a_full_queue_sheds_and_recovers(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    batching = Batching(max_batch=1, max_wait_s=0.0, max_queued=2)
    async with serving(scorer, batching) as service:
        first = asyncio.create_task(service.select(request_of(90), PLAN, WAIT_S))
        await scorer.wait_until_held()
        queued = [
            asyncio.create_task(service.select(request_of(70 + extra), PLAN, WAIT_S))
            for extra in range(2)
        ]
        await asyncio.sleep(0)
        with pytest.raises(Overloaded) as shed:
            await service.select(request_of(99), PLAN, WAIT_S)
        assert shed.value.retry_after_s > 0
        scorer.gate.set()
        await asyncio.gather(first, *queued)
        await service.select(request_of(99), PLAN, WAIT_S)


@pytest.mark.asyncio
async def test_a_prompt_that_is_shed_is_not_cut_into_chunks(scorer: GatedScorer) -> None:
    cut: list[int] = []

    class NotingChunker(Chunker):
        def chunks(self, prompt: Sequence[int]) -> Chunks:
            cut.append(len(prompt))
            return super().chunks(prompt)

    batching = Batching(max_batch=1, max_wait_s=0.0, max_queued=1)
    load_chunks = partial(NotingChunker, POLICY.chunk_tokens, None)
    async with SpeculatorService(lambda: scorer, POLICY, batching, load_chunks=load_chunks) as made:
        scorer.gate.clear()
        first = asyncio.create_task(made.select(request_of(90), PLAN, WAIT_S))
        await scorer.wait_until_held()
        queued = asyncio.create_task(made.select(request_of(91), PLAN, WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await made.select(request_of(92), PLAN, WAIT_S)
        scorer.gate.set()
        chosen = await asyncio.gather(first, queued)
        again = await made.select(request_of(91), PLAN, WAIT_S)  # its scores and chunks are known
    assert cut == [90, 91]
    assert again.runs == chosen[1].runs


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("request_", "plan", "reason"),
    [
        (request_of(600), PLAN, Reason.PROMPT_TOO_LONG_FOR_SPECULATOR),
        (request_of(510), PLAN, Reason.PROMPT_TOO_LONG_FOR_SPECULATOR),
        (request_of(200), Plan(PlanKind.PRUNE, Reason.ASKED, 1.0), Reason.KEEP_IS_ONE),
        (request_of(200, (Span(0, 200),)), PLAN, Reason.PROTECTED_SPANS),
        (request_of(200), Plan(PlanKind.DENSE, Reason.DISABLED), Reason.DISABLED),
    ],
)
async def test_prompts_that_scores_cannot_help_are_dense_at_once(
    scorer: GatedScorer, request_: Request, plan: Plan, reason: Reason
) -> None:
    async with serving(scorer) as service:
        selection = await service.select(request_, plan, WAIT_S)
    assert selection.plan == Plan(PlanKind.DENSE, reason)
    assert selection.kept_tokens == len(request_.prompt)
    assert scorer.finished == []


@pytest.mark.asyncio
async def test_the_longest_prompt_that_fits_is_scored(scorer: GatedScorer) -> None:
    async with serving(scorer) as service:
        selection = await service.select(request_of(509), PLAN, WAIT_S)
    assert selection.plan.kind is PlanKind.PRUNE


@pytest.mark.asyncio
@pytest.mark.parametrize("token", [-1, VOCABULARY])
async def test_foreign_token_ids_are_the_callers_fault(scorer: GatedScorer, token: int) -> None:
    request = Request(request_id="r", prompt=(1,) * 100 + (token,), sampling=b"")
    async with serving(scorer) as service:
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await service.select(request, PLAN, WAIT_S)
        with pytest.raises(InvalidRequest, match="empty"):
            await service.select(Request(request_id="e", prompt=(), sampling=b""), PLAN, WAIT_S)


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "failure", [torch.OutOfMemoryError("no memory"), IndexError("position 9"), KeyError("a bug")]
)
async def test_a_failed_batch_fails_its_requests_and_not_the_service(
    scorer: GatedScorer, failure: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async with serving(scorer) as service:
        scorer.failure = failure
        with pytest.raises(SpeculatorUnavailable, match=failure.args[0]):
            await service.select(request_of(100), PLAN, WAIT_S)
        assert [record.exc_info[1] for record in caplog.records if record.exc_info] == [failure]
        scorer.failure = None
        assert service.is_running
        assert (await service.select(request_of(100), PLAN, WAIT_S)).prompt_tokens == 100


@pytest.mark.asyncio
@pytest.mark.parametrize("failing_pass", ["read_pass", "look_ahead"])
async def test_failures_in_a_row_stop_the_service_and_hang_nobody(
    scorer: GatedScorer, failing_pass: str
) -> None:
    async with serving(scorer) as service:
        scorer.failure, scorer.failing_pass = KeyError("a broken device"), failing_pass
        for tokens in range(100, 100 + MAX_FAILURES_IN_A_ROW):
            assert service.is_running
            with pytest.raises(SpeculatorUnavailable):
                await service.select(request_of(tokens), PLAN, WAIT_S)
        await asyncio.sleep(0)  # the loop's task ends behind its last answer
        assert (service.is_running, service.has_failed) == (False, True)
        with pytest.raises(SpeculatorUnavailable, match="not running"):
            await service.select(request_of(100), PLAN, WAIT_S)


@pytest.mark.asyncio
async def test_closing_fails_what_waits_and_is_idempotent(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    service = SpeculatorService(lambda: scorer, POLICY, Batching(max_batch=1, max_wait_s=0.0))
    await service.start()
    tasks = [
        asyncio.create_task(service.select(request_of(100 + extra), PLAN, WAIT_S))
        for extra in range(3)
    ]
    await scorer.wait_until_held()
    closing = asyncio.create_task(service.close())
    await asyncio.sleep(0.01)
    scorer.gate.set()
    await closing
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, SpeculatorUnavailable) for result in results)
    assert scorer.finished == []
    await service.close()
    assert (service.is_running, service.has_failed) == (False, False)


@pytest.mark.asyncio
async def test_start_refuses_a_model_that_cannot_score() -> None:
    def load() -> Scorer:
        raise UnsupportedModel("vocabularies differ")

    service = SpeculatorService(load, POLICY, Batching())
    with pytest.raises(UnsupportedModel, match="vocabularies"):
        await service.start()
    await service.close()
    assert not service.is_running


@pytest.mark.asyncio
async def test_what_it_does_is_counted(scorer: GatedScorer) -> None:
    made = Instruments()
    batching = Batching(max_batch=2, max_wait_s=0.05, max_queued=1)
    async with serving(scorer, batching) as service:
        gauges = SpeculatorGauges(service, made)
        await service.select(request_of(100), PLAN, WAIT_S)
        await service.select(request_of(100), PLAN, WAIT_S)  # remembered
        scorer.gate.clear()
        scorer.entered.clear()
        lost = asyncio.create_task(service.select(request_of(90), PLAN, 0.3))
        await scorer.wait_until_held()
        queued = asyncio.create_task(service.select(request_of(70), PLAN, WAIT_S))
        await asyncio.sleep(0)
        with pytest.raises(Overloaded):
            await service.select(request_of(80), PLAN, WAIT_S)
        gauges.update()
        assert (made.total(f"{NAME}_queued"), made.total(f"{NAME}_scoring")) == (1, 1)
        with pytest.raises(ScoringTimeout):
            await lost
        scorer.gate.set()
        await queued
        gauges.record_self_test(0.875)
        gauges.update()
        gauges.update()
    counted = {
        name: made.total(f"{NAME}_{name}_total")
        for name in ("prompts", "repeated_prompts", "batches", "timeouts", "shed", "failures")
    }
    assert counted == {
        "prompts": 2, "repeated_prompts": 1, "batches": 2, "timeouts": 1, "shed": 1, "failures": 0,
    }  # fmt: skip
    assert made.observed(f"{NAME}_self_test") == [0.875, 0.875]  # again and again
    assert made.total(f"{NAME}_tokens_total") == 170
    assert made.total(f"{NAME}_read_seconds_total") > 0
    assert made.total(f"{NAME}_queue_seconds_total") > 0
