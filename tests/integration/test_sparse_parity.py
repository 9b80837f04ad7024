"""Sparse positions in vLLM equal transformers with explicit `position_ids`, token for token."""

import asyncio

import pytest

from specprefill.core.types import Span

from .conftest import Runner, answer, greedy_reference, kept, prompt_of

RUNNERS = tuple(Runner)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

# Gaps at the start, inside and at the end; lengths that are no multiple of the block size;
# kept tokens beyond one prefill chunk (512).
CASES = {
    "whole": (100, (Span(0, 100),)),
    "gaps": (700, (Span(0, 40), Span(100, 229), Span(333, 400), Span(690, 700))),
    "first_tokens_dropped": (300, (Span(10, 42), Span(50, 51), Span(290, 300))),
    "last_tokens_dropped": (400, (Span(0, 64), Span(200, 264))),
    "one_block_exactly": (500, (Span(0, 16), Span(400, 416))),
    "chunked_prefill": (1500, (Span(0, 4), Span(32, 64), Span(500, 1100), Span(1400, 1500))),
    "chunked_whole": (1300, (Span(0, 1300),)),
    "fetched_behind": (700, (Span(0, 40), Span(300, 350), Span(100, 132), Span(650, 700))),
    "long_gaps": (6000, tuple(Span(start, start + 33) for start in range(0, 6000, 400))),
}


@pytest.fixture(scope="module")
def reference(model_dir):
    """Greedy decoding by transformers at explicit positions."""
    import torch
    from transformers import LlamaForCausalLM

    return greedy_reference(LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32))


async def test_engines_have_the_replay_of_their_runner(engines):
    """vLLM loads no logits processor that is not made for the runner of the engine."""
    names = {Runner.V1: "replay:ReplayTokens", Runner.V2: "replay_v2:ReplayTokensV2"}
    (processor,) = engines.prefill_engine._args.logits_processors
    assert processor == f"specprefill.engine.sparse.{names[engines.runner]}"


@pytest.mark.parametrize("case", CASES)
async def test_one_engine_equals_transformers(engines, reference, case):
    length, runs = CASES[case]
    prompt, selection = prompt_of(length), kept(length, *runs)
    request = engines.request(prompt, ignore_eos=True)
    got = await engines.aggregated(request, selection)
    assert list(got.token_ids) == reference(prompt, selection, engines.answer_tokens)


async def test_a_mixed_batch_through_the_hand_off_equals_transformers(engines, reference):
    jobs = [
        (prompt_of(length, seed), kept(length, *runs))
        for seed, (length, runs) in enumerate(CASES.values())
    ]
    requests = [engines.request(prompt, ignore_eos=True) for prompt, _ in jobs]
    answers = await asyncio.gather(
        *(
            engines.handed_over(request, selection)
            for request, (_, selection) in zip(requests, jobs, strict=True)
        )
    )
    for (prompt, selection), (_, steps) in zip(jobs, answers, strict=True):
        assert answer(steps) == reference(prompt, selection, engines.answer_tokens)
        assert not any(step.recomputed for step in steps)


async def test_the_positions_are_what_makes_the_difference(engines, reference):
    """The same kept tokens at contiguous positions give another answer: the test can fail."""
    length, runs = CASES["gaps"]
    prompt, selection = prompt_of(length), kept(length, *runs)
    packed = selection.engine_prompt(tuple(prompt))
    contiguous = reference(packed, kept(len(packed), Span(0, len(packed))), 12)
    assert contiguous != reference(prompt, selection, 12)
