"""The service around the scorer: batches, cancellation, deadlines, overload, ways out."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from specprefill.errors import (
    DeadlineExceeded,
    InvalidRequest,
    Overloaded,
    SpeculatorUnavailable,
    UnsupportedModel,
)
from specprefill.selection import SelectionPolicy, select
from specprefill.speculator.draft import Draft, as_draft
from specprefill.speculator.reading import Reading
from specprefill.speculator.scorer import Scorer, never
from specprefill.speculator.service import Batching, Pace, SpeculatorService
from specprefill.speculator.translation import Translator
from specprefill.types import Plan, PlanKind, Reason, Request, Span

VOCABULARY = 61
POLICY = SelectionPolicy(chunk_tokens=8, min_kept_tokens=8, sink_tokens=2, tail_tokens=4)
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
WAIT_S = 10.0  # far more than anything here takes


@pytest.fixture(scope="module")
def draft() -> Draft:
    torch.set_num_threads(1)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return as_draft(LlamaForCausalLM(config).eval())


class GatedScorer(Scorer):
    """A scorer that notes what it does and lets a test hold it between two prefill chunks."""

    def __init__(self, draft: Draft, memory_bytes: int = 1 << 30) -> None:
        super().__init__(draft, 4, 16, pool_tokens=13, memory_bytes=memory_bytes)
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.batches: list[int] = []
        self.seen: list[Reading] = []
        self.finished: list[int] = []  # prompt lengths read to their end
        self.failure: Exception | None = None

    def read(
        self, readings: Sequence[Reading], is_abandoned: Callable[[Reading], bool] = never
    ) -> list[Reading]:
        self.seen += readings
        self.entered.set()
        if self.failure is not None:
            raise self.failure

        def is_abandoned_after_the_gate(reading: Reading) -> bool:
            assert self.gate.wait(WAIT_S)
            return is_abandoned(reading)

        read = super().read(readings, is_abandoned_after_the_gate)
        self.finished += [len(reading.prompt) for reading in read]
        return read

    def look_ahead(self, readings: Sequence[Reading]) -> None:
        self.batches.append(len(readings))
        super().look_ahead(readings)

    async def held(self) -> None:
        """Until the thread has reached the gate."""
        assert await asyncio.to_thread(self.entered.wait, WAIT_S)


@pytest.fixture
def scorer(draft: Draft) -> GatedScorer:
    return GatedScorer(draft)


@asynccontextmanager
async def serving(
    scorer: Scorer, batching: Batching | None = None
) -> AsyncIterator[SpeculatorService]:
    chosen = Batching(max_wait_s=0.05) if batching is None else batching
    async with SpeculatorService(lambda: scorer, POLICY, chosen) as service:
        yield service


def request_of(tokens: int, protected: tuple[Span, ...] = ()) -> Request:
    prompt = tuple(np.random.default_rng(tokens).integers(0, VOCABULARY, tokens).tolist())
    return Request(request_id=str(tokens), prompt=prompt, sampling=b"", protected=protected)


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


def test_prompts_join_a_batch_only_while_that_shortens_the_mean_wait() -> None:
    assert Pace().pays_to_join(7, 100_000)  # nothing measured yet
    pace = Pace(token_s=1e-4, look_ahead_s=0.2)
    assert pace.pays_to_join(1, 2000)
    assert not pace.pays_to_join(1, 2001)
    assert pace.pays_to_join(4, 500)
    assert not pace.pays_to_join(4, 501)


def test_the_pace_follows_measurements() -> None:
    first = Pace().measured(1.0, 2.0)
    assert first == Pace(1.0, 2.0)
    second = first.measured(2.0, 2.0)
    assert second.token_s == pytest.approx(1.2)
    assert second.look_ahead_s == pytest.approx(2.0)


@pytest.mark.asyncio
async def test_a_cancelled_request_is_dropped_between_chunks(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    async with serving(scorer) as service:
        task = asyncio.create_task(service.select(request_of(300), PLAN, WAIT_S))
        await scorer.held()
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
        await scorer.held()
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
async def test_a_full_queue_sheds_and_recovers(scorer: GatedScorer) -> None:
    scorer.gate.clear()
    batching = Batching(max_batch=1, max_wait_s=0.0, max_queued=2)
    async with serving(scorer, batching) as service:
        first = asyncio.create_task(service.select(request_of(90), PLAN, WAIT_S))
        await scorer.held()
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
async def test_a_failed_batch_fails_its_requests_and_not_the_service(scorer: GatedScorer) -> None:
    async with serving(scorer) as service:
        scorer.failure = torch.OutOfMemoryError("no memory")
        with pytest.raises(SpeculatorUnavailable, match="no memory"):
            await service.select(request_of(100), PLAN, WAIT_S)
        scorer.failure = None
        assert service.is_running
        assert (await service.select(request_of(100), PLAN, WAIT_S)).prompt_tokens == 100


@pytest.mark.asyncio
async def test_an_unknown_failure_stops_the_service_and_hangs_nobody(scorer: GatedScorer) -> None:
    async with serving(scorer) as service:
        scorer.failure = KeyError("a bug")
        with pytest.raises(SpeculatorUnavailable):
            await service.select(request_of(100), PLAN, WAIT_S)
        assert not service.is_running
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
    await scorer.held()
    closing = asyncio.create_task(service.close())
    await asyncio.sleep(0.01)
    scorer.gate.set()
    await closing
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(result, SpeculatorUnavailable) for result in results)
    assert scorer.finished == []
    await service.close()
    assert not service.is_running


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
async def test_a_repeated_prompt_is_not_read_again_whatever_its_plan(scorer: GatedScorer) -> None:
    request = request_of(200)
    other = Plan(PlanKind.PRUNE, Reason.ASKED, 0.6)
    async with serving(scorer) as service:
        first = await service.select(request, PLAN, WAIT_S)
        again = await service.select(replace(request, request_id="again"), PLAN, WAIT_S)
        more = await service.select(request, other, WAIT_S)
    assert scorer.finished == [200]
    assert (again.runs, again.plan) == (first.runs, first.plan)
    assert more.kept_tokens > first.kept_tokens
    assert (first.remembered_tokens, again.remembered_tokens) == (0, 200)
    assert again.queue_s == 0.0


@pytest.mark.asyncio
async def test_scores_are_forgotten_beyond_their_budget(scorer: GatedScorer) -> None:
    batching = Batching(max_wait_s=0.0, score_cache_bytes=4 * 150)
    async with serving(scorer, batching) as service:
        for tokens in (100, 90, 100, 200, 200):
            await service.select(request_of(tokens), PLAN, WAIT_S)
    assert scorer.finished == [100, 90, 100, 200, 200]


@pytest.mark.asyncio
async def test_a_second_question_reads_only_itself(scorer: GatedScorer) -> None:
    document, question = request_of(256), (1, 2, 3) * 20
    second = replace(document, prompt=document.prompt + question)
    async with serving(scorer) as service:
        await service.select(document, PLAN, WAIT_S)
        selection = await service.select(second, PLAN, WAIT_S)
    assert selection.remembered_tokens == 256
    (scores,) = Scorer(scorer.draft, 4, 16, pool_tokens=13).score([second.prompt])
    assert selection.runs == select(scores, PLAN, (), POLICY).runs


@pytest.mark.asyncio
async def test_prompts_that_do_not_fit_together_wait_and_one_that_never_fits_is_dense(
    draft: Draft,
) -> None:
    room = Scorer(draft, 4, 16, pool_tokens=13).kv_bytes(300)
    scorer = GatedScorer(draft, memory_bytes=room)
    async with serving(scorer) as service:
        selections = await asyncio.gather(
            *(service.select(request_of(tokens), PLAN, WAIT_S) for tokens in (160, 170, 110, 301))
        )
    assert scorer.finished == [160, 110, 170]
    assert scorer.batches == [2, 1]
    assert [selection.plan.kind for selection in selections[:3]] == [PlanKind.PRUNE] * 3
    reason = Reason.PROMPT_TOO_LARGE_FOR_SPECULATOR
    assert selections[3].plan == Plan(PlanKind.DENSE, reason)


@pytest.mark.asyncio
async def test_a_cancelled_prompt_frees_its_memory_for_the_next(draft: Draft) -> None:
    room = Scorer(draft, 4, 16, pool_tokens=13).kv_bytes(300)
    scorer = GatedScorer(draft, memory_bytes=room)
    scorer.gate.clear()
    async with serving(scorer) as service:
        task = asyncio.create_task(service.select(request_of(300), PLAN, WAIT_S))
        await scorer.held()
        task.cancel()
        await asyncio.wait([task])
        scorer.gate.set()
        assert (await service.select(request_of(299), PLAN, WAIT_S)).plan == PLAN
    assert scorer.finished == [299]
    assert [reading.keys.numel() for reading in scorer.seen] == [0, 0]


@pytest.mark.asyncio
async def test_a_draft_with_other_tokens_selects_tokens_of_the_main_model(draft: Draft) -> None:
    """The main model's tokens are letters, the draft's are pairs of them."""
    main = Tokenizer(models.WordLevel({letter: place for place, letter in enumerate("abc")}, "a"))
    main.decoder = decoders.Fuse()
    pairs = [first + second for first in "abc" for second in "abc"]
    other = Tokenizer(models.WordLevel({pair: place for place, pair in enumerate(pairs)}, "aa"))
    other.pre_tokenizer = pre_tokenizers.Split(Regex(".."), "isolated")
    translator = Translator(main, other, draft_bos=None)
    scorer = Scorer(draft, 4, 16, pool_tokens=13, translator=translator)
    letters = tuple(np.random.default_rng(0).integers(0, 3, 800).tolist())
    request = Request(request_id="r", prompt=letters, sampling=b"", protected=(Span(301, 304),))
    async with serving(scorer) as service:
        selection = await service.select(request, PLAN, WAIT_S)
        longer = replace(request, prompt=letters + (1, 2) * 50)
        second = await service.select(longer, PLAN, WAIT_S)
        with pytest.raises(InvalidRequest, match="vocabulary"):
            await service.select(replace(request, prompt=(*letters, 3)), PLAN, WAIT_S)
        too_long = await service.select(replace(request, prompt=letters * 2), PLAN, WAIT_S)
    assert selection.prompt_tokens == 800
    assert selection.plan == PLAN
    as_pairs = tuple(3 * letters[at] + letters[at + 1] for at in range(0, 800, 2))
    (by_pair,) = Scorer(draft, 4, 16, pool_tokens=13).score([as_pairs])
    expected = select(np.repeat(by_pair, 2), PLAN, request.protected, POLICY)
    assert selection.runs == expected.runs
    assert second.remembered_tokens == 768  # six blocks of 64 pairs
    assert too_long.plan == Plan(PlanKind.DENSE, Reason.PROMPT_TOO_LONG_FOR_SPECULATOR)
