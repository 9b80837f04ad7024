"""Prompts that the scorer remembers change no scores and stay within its budget."""

from __future__ import annotations

import numpy as np
import pytest
from transformers import (
    PreTrainedModel,
)

from specprefill.core.selection import Scores
from specprefill.speculator.draft import (
    as_draft,
)
from specprefill.speculator.scorer import Scorer
from tests.unit.speculator.tiny_models import (
    POOL,
    chosen,
    prompt_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def remembering(llama: PreTrainedModel, memory_bytes: int = 1 << 30) -> Scorer:
    return Scorer(as_draft(llama), 8, 64, POOL, memory_bytes)


def score_and_remember(scorer: Scorer, prompt: tuple[int, ...]) -> tuple[Scores, int]:
    """The scores, and how many tokens were not computed for them."""
    with scorer.open_readings([prompt]) as readings:
        scorer.read(readings)
        scorer.look_ahead(readings)
        scorer.remember(readings)
        return scorer.rate(readings[0]), readings[0].cached_tokens


@pytest.mark.parametrize("shared", [0, 63, 64, 200, 256])
def test_scores_do_not_depend_on_what_is_remembered(llama: PreTrainedModel, shared: int) -> None:
    scorer = remembering(llama)
    document = prompt_of(256)
    score_and_remember(scorer, document)
    prompt = document[:shared] + prompt_of(70, seed=5)
    (fresh,) = remembering(llama).score([prompt])
    scores, cached = score_and_remember(scorer, prompt)
    assert cached == shared // 64 * 64
    np.testing.assert_allclose(scores, fresh, rtol=1e-4, atol=1e-7)
    assert chosen(scores) == chosen(fresh)


def test_eviction_changes_no_scores(llama: PreTrainedModel) -> None:
    per_token = remembering(llama).kv_bytes(1000) // 1007
    scorer = remembering(llama, memory_bytes=900 * per_token)  # about three prompts
    prompts = [prompt_of(256, seed=seed) + prompt_of(30, seed=9) for seed in range(4)]
    expected = [remembering(llama).score([prompt])[0] for prompt in prompts]
    cached_tokens = []
    for index in (0, 1, 0, 2, 3, 0, 1):
        scores, cached = score_and_remember(scorer, prompts[index])
        cached_tokens.append(cached)
        np.testing.assert_allclose(scores, expected[index], rtol=1e-4, atol=1e-7)
        assert chosen(scores) == chosen(expected[index])
    assert cached_tokens[:3] == [0, 0, 256]
    assert cached_tokens[-1] < 256


def test_memory_stays_within_its_budget_over_many_prompts(llama: PreTrainedModel) -> None:
    scorer = remembering(llama, memory_bytes=300_000)
    rng = np.random.default_rng(0)
    for seed in range(60):
        prompt = prompt_of(int(rng.integers(1, 300)), seed=seed)
        with scorer.open_readings([prompt]) as readings:
            in_use = sum(each.keys.nbytes + each.values.nbytes for each in readings)
            assert in_use == scorer.kv_bytes(len(prompt))
            assert in_use + scorer.prefix.bytes_held <= scorer.memory_bytes
            scorer.read(readings)
            scorer.look_ahead(readings)
            scorer.remember(readings)
            assert in_use + scorer.prefix.bytes_held <= scorer.memory_bytes
    assert scorer.prefix.bytes_held > 0
