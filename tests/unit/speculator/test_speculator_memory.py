"""Memories of the service, prompts that fit into its memory, and drafts with other tokens."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from specprefill.core.errors import (
    InvalidRequest,
)
from specprefill.core.selection import select
from specprefill.core.types import Plan, PlanKind, Reason, Request, Span
from specprefill.speculator.draft import Draft
from specprefill.speculator.jobs import Batching
from specprefill.speculator.scorer import Scorer
from specprefill.speculator.translation import Translator
from tests.unit.speculator.gated_scorer import (
    PLAN,
    POLICY,
    WAIT_S,
    GatedScorer,
    request_of,
    serving,
)


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
    assert scorer.finished == [110, 160, 170]
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
        await scorer.wait_until_held()
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
