"""The question before a tool's results is read again behind the prompt, and scores it."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from specprefill.core.selection import Scores
from specprefill.core.types import Request, Span
from specprefill.speculator.draft import as_draft
from specprefill.speculator.jobs import Batching
from specprefill.speculator.method import QUESTION_TOKENS, Queries, Reduction, ScoringMethod
from specprefill.speculator.scorer import Scorer
from specprefill.speculator.service import SpeculatorService
from specprefill.speculator.translation import SamePrompt
from tests.unit.speculator.tiny_models import (
    PLAN,
    POLICY,
    POOL,
    SHAPES,
    prompt_of,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = {0: (1,), 1: (0, 3)}
ECHO = prompt_of(20, seed=9)


def method(queries: Queries) -> ScoringMethod:
    return ScoringMethod(HEADS, Reduction.MEAN, queries)


@torch.inference_mode()
def echo_reference(
    model: PreTrainedModel, prompt: tuple[int, ...], echo: tuple[int, ...]
) -> Scores:
    """The mean pooled attention of the echo to the prompt alone, from one whole eager pass."""
    scores: Scores = pooled_attention(model, prompt, echo, HEADS).mean(dim=(0, 1)).numpy()
    return scores


@torch.inference_mode()
def pooled_attention(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    echo: tuple[int, ...],
    heads: Mapping[int, Sequence[int]],
) -> torch.Tensor:
    """[heads, echo, prompt], from one whole eager pass."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(torch.tensor([prompt + echo]), use_cache=False, output_attentions=True)
    rows = [output.attentions[layer][0, list(some)] for layer, some in heads.items()]
    weights = torch.cat(rows)[:, len(prompt) :, : len(prompt)]
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return functional.avg_pool1d(weights, POOL, 1, POOL // 2)


def scored(
    scorer: Scorer, prompts: list[tuple[int, ...]], echoes: list[tuple[int, ...]]
) -> list[Scores]:
    with scorer.open_readings(prompts, echoes=echoes) as readings:
        scorer.read(readings)
        scorer.look_ahead(readings)
        found = [scorer.rate(reading) for reading in readings]
        scorer.remember(readings)
    return found


@pytest.mark.parametrize("chunk", [16, 1000])
@pytest.mark.parametrize("tokens", [3, 65, 200])
@pytest.mark.parametrize("name", list(SHAPES))
def test_an_echos_queries_equal_an_eager_reference(name: str, tokens: int, chunk: int) -> None:
    model = tiny_model(name)
    prompt, other = prompt_of(tokens, seed=tokens), prompt_of(90)
    expected = echo_reference(model, prompt, ECHO)
    draft = as_draft(model)
    for each in (draft, replace(draft, quick=None)):
        scorer = Scorer(each.up_to(1), 8, chunk, POOL, method=method(Queries.QUESTION))
        (alone,) = scorer.score([other])
        for _ in range(2):  # then from the prefix cache
            without, with_echo = scored(scorer, [other, prompt], [(), ECHO])
            np.testing.assert_allclose(with_echo, expected, rtol=1e-4, atol=1e-6)
            np.testing.assert_allclose(without, alone, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("queries", list(Queries))
def test_an_echo_alone_asks_whatever_the_method(queries: Queries, llama: PreTrainedModel) -> None:
    prompt = prompt_of(150)
    draft = as_draft(copy.deepcopy(llama))
    scorer = Scorer(draft, 8, 64, POOL, method=method(queries))
    (scores,) = scored(scorer, [prompt], [ECHO])
    expected = echo_reference(llama, prompt, ECHO)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_all_heads_together_score_by_the_squares_of_their_attention(llama: PreTrainedModel) -> None:
    prompt = prompt_of(150)
    scorer = Scorer(as_draft(copy.deepcopy(llama)), 8, 64, POOL)
    (scores,) = scored(scorer, [prompt], [ECHO])
    every = dict.fromkeys(
        range(llama.config.num_hidden_layers), range(llama.config.num_attention_heads)
    )
    expected = pooled_attention(llama, prompt, ECHO, every).square().mean(dim=(0, 1)).numpy()
    np.testing.assert_allclose(scores, expected, rtol=1e-3, atol=1e-8)


def test_it_does_not_change_how_sure_the_look_ahead_is(llama: PreTrainedModel) -> None:
    found = []
    for echo in ((), ECHO):
        scorer = Scorer(as_draft(copy.deepcopy(llama)), 8, 64, POOL)
        with scorer.open_readings([prompt_of(150)], echoes=[echo]) as (reading,):
            scorer.read([reading])
            scorer.look_ahead([reading])
            found.append(reading.certainties)
    assert found[0] == found[1]


def test_an_echo_has_at_most_a_questions_tokens_and_those_there_is_room_for(
    llama: PreTrainedModel,
) -> None:
    scorer = Scorer(as_draft(llama), 8, 512, POOL)
    positions = llama.config.max_position_embeddings
    prompt = SamePrompt(prompt_of(200))
    spans = (Span(3, 13), Span(20, 130))
    asked = prompt.prompt[3:13] + prompt.prompt[20:130]
    assert scorer.echo_of(prompt, spans[:1]) == prompt.prompt[3:13]
    assert scorer.echo_of(prompt, spans) == asked[-QUESTION_TOKENS:]
    assert scorer.echo_of(prompt, ()) == ()
    long = SamePrompt(prompt_of(positions - 20))
    assert len(scorer.echo_of(long, spans)) == 20
    (scores,) = scored(scorer, [long.prompt], [scorer.echo_of(long, spans)])
    assert np.isfinite(scores).all()
    assert scorer.echo_of(SamePrompt(prompt_of(positions)), spans) == ()


def test_an_echo_counts_in_memory(llama: PreTrainedModel) -> None:
    scorer = Scorer(as_draft(llama), 8, 512, POOL)
    token = scorer.draft.layout.bytes_per_token
    assert scorer.kv_bytes(100) == scorer.kv_bytes(100, 5) == 107 * token  # in place of the answer
    assert scorer.kv_bytes(100, 64) == 164 * token


def test_what_is_remembered_of_a_prompt_is_without_its_echo(llama: PreTrainedModel) -> None:
    prompt = prompt_of(256)
    scorer = Scorer(as_draft(llama), 8, 64, POOL, method=method(Queries.BOTH))
    scored(scorer, [prompt], [ECHO])
    longer = prompt + prompt_of(80, seed=5)
    with scorer.open_readings([longer]) as (reading,):
        assert reading.cached_tokens == 256
        scorer.read([reading])
        scorer.look_ahead([reading])
        again = scorer.rate(reading)
    (afresh,) = Scorer(as_draft(llama), 8, 64, POOL, method=method(Queries.BOTH)).score([longer])
    np.testing.assert_allclose(again, afresh, rtol=1e-4, atol=1e-6)


async def test_the_service_scores_by_what_a_request_says_is_asked(llama: PreTrainedModel) -> None:
    prompt = prompt_of(200)
    draft = as_draft(copy.deepcopy(llama))
    spans = (Span(3, 13), Span(40, 50))
    echo = prompt[3:13] + prompt[40:50]

    def load() -> Scorer:
        return Scorer(draft, 8, 64, POOL, method=method(Queries.QUESTION))

    (by_echo,) = scored(load(), [prompt], [echo])
    (by_end,) = load().score([prompt])
    async with SpeculatorService(load, POLICY, Batching()) as service:
        # The second is no repeat of the first, though the prompt is.
        for asked, expected in (((), by_end), (spans, by_echo), ((), by_end)):
            request = Request("r", prompt, b"", asked=asked, wants_scores=True)
            selection = await service.select(request, PLAN, 30.0)
            assert selection.scores is not None
            means = [expected[start : start + 8].mean() for start in range(0, 200, 8)]
            worth = selection.scores.worth  # of the chunks between the protected ends
            np.testing.assert_allclose(worth[1:-1], means[1:-1], rtol=1e-4)
        assert service.counts.repeats == 1
