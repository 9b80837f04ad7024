"""The scorer against a plain eager reference: one whole forward pass, weights read off it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    PreTrainedModel,
)

from specprefill.core.selection import Scores
from specprefill.speculator.attention import causal_attention
from specprefill.speculator.draft import (
    as_draft,
    feed_token,
    read_chunk,
)
from specprefill.speculator.llama import Llama
from specprefill.speculator.method import QUESTION_TOKENS, Queries, Reduction, ScoringMethod
from specprefill.speculator.rating import average_pool
from specprefill.speculator.reading import Reading
from specprefill.speculator.scorer import Scorer
from tests.unit.speculator.tiny_models import (
    POOL,
    SHAPES,
    chosen,
    prompt_of,
    scorer_of,
    tiny_config,
    tiny_model,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.inference_mode()
def reference_scores(
    model: PreTrainedModel,
    prompt: tuple[int, ...],
    look_ahead: int,
    eos: frozenset[int],
    layers: Sequence[int] = (0, 1, 2),
) -> tuple[Scores, list[int]]:
    """The paper's score from whole eager forward passes, and the tokens generated on the way."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    tokens = list(prompt)
    while len(tokens) < len(prompt) + look_ahead - 1:
        following = int(eager(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        if following in eos:
            break
        tokens.append(following)
    output = eager(torch.tensor([tokens]), use_cache=False, output_attentions=True)
    chosen_layers = [output.attentions[layer] for layer in layers]
    weights = torch.cat(chosen_layers)[:, :, len(prompt) - 1 :, : len(prompt)]
    weights = weights / weights.sum(dim=-1, keepdim=True)  # the softmax over the prompt alone
    count, heads, steps, length = weights.shape
    pooled = functional.avg_pool1d(weights.reshape(-1, steps, length), POOL, 1, POOL // 2)
    highest = pooled.view(count * heads, steps, length).amax(dim=0)
    return highest.mean(dim=0).numpy(), tokens[len(prompt) :]


@pytest.mark.parametrize("tokens", [5, 64, 65, 131, 200])
@pytest.mark.parametrize("name", list(SHAPES))
def test_scores_equal_an_eager_reference(name: str, tokens: int) -> None:
    model = tiny_model(name)
    prompt = prompt_of(tokens, seed=tokens)
    expected, generated = reference_scores(model, prompt, 8, frozenset())
    (scores,) = scorer_of(as_draft(model)).score([prompt])
    assert len(generated) == 7
    assert scores.dtype == np.float32
    assert scores.shape == (tokens,)
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    assert chosen(scores) == chosen(expected)


def test_generated_tokens_vary(llama: PreTrainedModel) -> None:
    _, generated = reference_scores(llama, prompt_of(131, seed=131), 8, frozenset())
    assert len(set(generated)) > 3


@pytest.mark.parametrize("chunk", [1, 16, 33, 99])
def test_chunked_prefill_equals_unchunked(llama: PreTrainedModel, chunk: int) -> None:
    draft = as_draft(llama)
    prompt = prompt_of(100)
    (whole,) = scorer_of(draft, chunk=1000).score([prompt])
    (chunked,) = scorer_of(draft, chunk=chunk).score([prompt])
    np.testing.assert_allclose(chunked, whole, rtol=1e-4, atol=1e-7)
    assert chosen(chunked) == chosen(whole)


@pytest.mark.parametrize("look_ahead", [1, 2, 8])
def test_a_batch_of_different_lengths_equals_single_requests(
    llama: PreTrainedModel, look_ahead: int
) -> None:
    scorer = scorer_of(as_draft(llama), look_ahead=look_ahead)
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (40, 150, 3, 97)]
    for prompt, scores in zip(prompts, scorer.score(prompts), strict=True):
        (alone,) = scorer.score([prompt])
        np.testing.assert_allclose(scores, alone, rtol=1e-4, atol=1e-7)
        assert chosen(scores) == chosen(alone)


def test_look_ahead_one_uses_the_last_prompt_token_alone(llama: PreTrainedModel) -> None:
    prompt = prompt_of(120)
    expected, generated = reference_scores(llama, prompt, 1, frozenset())
    (scores,) = scorer_of(as_draft(llama), look_ahead=1).score([prompt])
    assert generated == []
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("ends_after", [0, 1, 3])
def test_no_query_comes_from_an_end_token_or_after_it(
    llama: PreTrainedModel, ends_after: int
) -> None:
    prompt = prompt_of(131, seed=131)
    _, free = reference_scores(llama, prompt, 8, frozenset())
    assert free[ends_after] not in free[:ends_after]
    eos = frozenset([free[ends_after]])
    scorer = scorer_of(replace(as_draft(llama), eos_ids=eos))
    expected, generated = reference_scores(llama, prompt, 8, eos)
    assert len(generated) == ends_after
    longer = prompt_of(70, seed=3)
    (scores, _) = scorer.score([prompt, longer])
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)
    with scorer.open_readings([prompt]) as readings:
        scorer.read(readings)
        scorer.look_ahead(readings)
        assert {len(queries) for queries in readings[0].queries} == {1 + ends_after}


def test_scores_are_deterministic(llama: PreTrainedModel) -> None:
    scorer = scorer_of(as_draft(llama))
    first, second = scorer.score([prompt_of(130)]), scorer.score([prompt_of(130)])
    assert np.array_equal(first[0], second[0])


def test_two_scorers_in_two_threads_do_not_mix() -> None:
    scorers = [scorer_of(as_draft(tiny_model(name))) for name in ("llama-mha", "qwen3-gqa2")]
    alone = [scorer.score([prompt_of(200)])[0] for scorer in scorers]
    together: dict[int, Scores] = {}

    def run(index: int) -> None:
        for _ in range(3):
            (together[index],) = scorers[index].score([prompt_of(200)])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(alone[index], together[index]) for index in range(2))


def test_an_abandoned_prompt_stops_between_chunks_and_frees_its_memory(
    llama: PreTrainedModel,
) -> None:
    scorer = scorer_of(as_draft(llama), chunk=10)
    (alone,) = scorer.score([prompt_of(60)])
    with scorer.open_readings([prompt_of(100), prompt_of(60)]) as (left, stays):

        def is_abandoned(reading: Reading) -> bool:
            return reading is left and reading.length >= 20

        assert scorer.read([left, stays], is_abandoned) == [stays]
        assert left.length == 20
        assert left.keys.numel() == left.values.numel() == 0
        scorer.look_ahead([stays])
        np.testing.assert_allclose(scorer.rate(stays), alone, rtol=1e-4, atol=1e-7)
    assert stays.keys.numel() == 0


def test_short_prompts_are_read_in_one_pass(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(as_draft(llama), chunk=64)
    passes: list[list[int]] = []

    def noted(
        model: PreTrainedModel, parts: Sequence[tuple[Reading, int]], quick: Llama | None
    ) -> None:
        passes.append([tokens for _, tokens in parts])
        read_chunk(model, parts, quick)

    monkeypatch.setattr("specprefill.speculator.scorer.read_chunk", noted)
    with scorer.open_readings([prompt_of(tokens) for tokens in (21, 31, 41, 1)]) as readings:
        scorer.read(readings)
    assert passes == [[20, 30, 14], [26]]


def test_the_last_layer_stops_a_pass_that_only_reads(llama: PreTrainedModel) -> None:
    ended: list[torch.nn.Module] = []
    scorer = scorer_of(replace(as_draft(llama), quick=None))
    hook = llama.model.layers[-1].mlp.register_forward_hook(lambda module, *_: ended.append(module))
    try:
        with scorer.open_readings([prompt_of(100)]) as readings:
            scorer.read(readings)
            assert ended == []
            assert readings[0].length == 99
            scorer.look_ahead(readings)
            assert len(ended) == 8
    finally:
        hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama-gqa2", "qwen2-gqa4"])
def test_a_model_without_its_modules_computes_the_same(name: str, dtype: torch.dtype) -> None:
    draft = as_draft(tiny_model(name).to(dtype))
    assert draft.quick is not None
    results = []
    for quick in (None, draft.quick):
        scorer = scorer_of(replace(draft, quick=quick))
        with (
            scorer.open_readings([prompt_of(40), prompt_of(71)]) as readings,
            torch.inference_mode(),
        ):
            scorer.read(readings)
            logits = feed_token(draft.model, readings, quick)
            queries = torch.stack(readings[1].queries[-1])
            results.append(
                [each.float() for each in (logits, queries, readings[1].keys[:, :, :71])]
            )
    close = 1e-5 if dtype is torch.float32 else 3e-2
    for theirs, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=close * float(theirs.abs().max()))


@pytest.mark.parametrize(
    ("name", "changed"), [("qwen3-gqa2", {}), ("llama-gqa2", {"hidden_act": "gelu"})]
)
def test_a_model_of_another_shape_is_called_as_a_whole(name: str, changed: dict[str, str]) -> None:
    kind, model, shape = SHAPES[name]
    torch.manual_seed(1)
    draft = as_draft(model(tiny_config(kind, **shape, **changed)).eval())
    assert draft.quick is None
    (scores,) = scorer_of(draft).score([prompt_of(70)])
    expected, _ = reference_scores(draft.model, prompt_of(70), 8, frozenset())
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("past", [0, 1, 37])
@pytest.mark.parametrize("tokens", [1, 2, 29])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_causal_attention_equals_the_definition(past: int, tokens: int, kv_heads: int) -> None:
    torch.manual_seed(past + tokens)
    query = torch.randn(1, 4, tokens, 16)
    keys, values = torch.randn(2, 1, kv_heads, past + tokens, 16)
    every_key, every_value = (each.repeat_interleave(4 // kv_heads, 1) for each in (keys, values))
    logits = query @ every_key.transpose(2, 3) * 0.3
    visible = torch.ones(tokens, past + tokens).tril(past).bool()
    expected = logits.masked_fill(~visible, -torch.inf).softmax(-1) @ every_value
    torch.testing.assert_close(causal_attention(query, keys, values, past, 0.3), expected)


@pytest.mark.parametrize("width", [1, 3, 13])
def test_average_pool_equals_torchs(width: int) -> None:
    weights = torch.rand(2, 3, 40)
    expected = functional.avg_pool1d(weights, width, 1, width // 2)
    torch.testing.assert_close(average_pool(weights, width), expected)


def test_the_scoring_buffer_does_not_change_scores(
    llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    scorer = scorer_of(as_draft(llama))
    (whole,) = scorer.score([prompt_of(90)])
    monkeypatch.setattr("specprefill.speculator.rating.SCORING_BUFFER", 1)
    (by_head,) = scorer.score([prompt_of(90)])
    np.testing.assert_allclose(by_head, whole, rtol=1e-5)


@torch.inference_mode()
def test_the_certainty_is_the_probability_of_the_least_sure_generated_token(
    llama: PreTrainedModel,
) -> None:
    prompt = prompt_of(40)
    _, generated = reference_scores(llama, prompt, 8, frozenset())
    eager = copy.deepcopy(llama)
    eager.set_attn_implementation("eager")
    logits = eager(torch.tensor([[*prompt, *generated]]), use_cache=False).logits[0, 39:]
    expected = float(logits.softmax(dim=-1).max(dim=-1).values.min())
    scorer = scorer_of(as_draft(llama))
    with scorer.open_readings([prompt]) as (reading,):
        scorer.read([reading])
        scorer.look_ahead([reading])
    assert len(reading.certainties) == 8
    assert reading.certainty == pytest.approx(expected, rel=1e-4)


@torch.inference_mode()
def test_named_heads_alone_count(llama: PreTrainedModel) -> None:
    prompt = prompt_of(90)
    every = {
        layer: tuple(range(llama.config.num_attention_heads))
        for layer in range(len(llama.model.layers))
    }
    draft = as_draft(copy.deepcopy(llama))
    (expected,) = scorer_of(draft).score([prompt])
    (all_named,) = Scorer(draft, 8, 64, POOL, method=ScoringMethod(every)).score([prompt])
    np.testing.assert_allclose(all_named, expected, rtol=1e-5)
    singles = [
        Scorer(draft, 8, 64, POOL, method=ScoringMethod({layer: (head,)})).score([prompt])[0]
        for layer, heads in every.items()
        for head in heads
    ]
    assert all((single <= expected + 1e-6).all() for single in singles)
    assert len({single.tobytes() for single in singles}) == len(singles)


@torch.inference_mode()
def question_reference(
    model: PreTrainedModel, prompt: tuple[int, ...], heads: dict[int, tuple[int, ...]]
) -> Scores:
    """The mean pooled attention of the last prompt tokens, from one whole eager pass."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    output = eager(torch.tensor([prompt]), use_cache=False, output_attentions=True)
    rows = [output.attentions[layer][0, list(some)] for layer, some in heads.items()]
    weights = torch.cat(rows)[:, -QUESTION_TOKENS:]
    pooled = functional.avg_pool1d(weights, POOL, 1, POOL // 2)
    scores: Scores = pooled.mean(dim=(0, 1)).numpy()
    return scores


@pytest.mark.parametrize("chunk", [16, 50, 1000])
@pytest.mark.parametrize("tokens", [3, 64, 65, 200])
@pytest.mark.parametrize("name", list(SHAPES))
def test_the_questions_own_queries_equal_an_eager_reference(
    name: str, tokens: int, chunk: int
) -> None:
    model = tiny_model(name)
    prompt = prompt_of(tokens, seed=tokens)
    heads = {0: (1,), 1: (0, 3)}
    expected = question_reference(model, prompt, heads)
    method = ScoringMethod(heads, Reduction.MEAN, Queries.QUESTION)
    draft = as_draft(model)
    for each in (draft, replace(draft, quick=None)):
        scorer = Scorer(each.up_to(1), 8, chunk, POOL, method=method)
        for prompts in ([prompt], [prompt_of(90), prompt], [prompt]):  # then from the prefix cache
            np.testing.assert_allclose(scorer.score(prompts)[-1], expected, rtol=1e-4, atol=1e-6)
        assert scorer.draft.layout.bytes_per_token < each.layout.bytes_per_token


def test_a_question_that_is_remembered_is_read_again(llama: PreTrainedModel) -> None:
    prompt = prompt_of(300)
    method = ScoringMethod({1: (0,)}, Reduction.MEAN, Queries.QUESTION)
    scorer = Scorer(as_draft(llama).up_to(1), 8, 64, POOL, method=method)
    found = []
    for _ in range(2):
        with scorer.open_readings([prompt]) as (reading,):
            scorer.read([reading])
            scorer.look_ahead([reading])
            found.append((reading.cached_tokens, scorer.rate(reading)))
            scorer.remember([reading])
    (first, scores), (cached, again) = found
    assert first == 0
    assert cached == 192  # whole blocks of 64 before the question's 64 tokens
    np.testing.assert_allclose(again, scores, rtol=1e-5)


@torch.inference_mode()
def test_the_mean_over_heads_is_that_of_single_ones(llama: PreTrainedModel) -> None:
    prompt = prompt_of(90)
    draft = as_draft(copy.deepcopy(llama))
    heads = {0: (1,), 2: (0, 2)}
    singles = [
        Scorer(draft, 8, 64, POOL, method=ScoringMethod({layer: (head,)})).score([prompt])[0]
        for layer, some in heads.items()
        for head in some
    ]
    (mean,) = Scorer(draft, 8, 64, POOL, method=ScoringMethod(heads, Reduction.MEAN)).score(
        [prompt]
    )
    np.testing.assert_allclose(mean, np.mean(singles, axis=0), rtol=1e-5, atol=1e-8)


@torch.inference_mode()
def test_a_given_answer_is_followed_as_a_generated_one_would_be(llama: PreTrainedModel) -> None:
    prompt = prompt_of(80)
    scorer = scorer_of(as_draft(copy.deepcopy(llama)))
    _, generated = reference_scores(llama, prompt, 8, frozenset())
    found = []
    for answer in (None, generated, [(token + 1) % 90 for token in generated], generated * 9):
        with scorer.open_readings([prompt]) as (reading,):
            scorer.read([reading])
            if answer is None:
                scorer.look_ahead([reading])
            else:
                scorer.follow(reading, answer)
            found.append(scorer.rate(reading))
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)
    assert np.abs(found[2] - found[0]).max() > 1e-3 * found[0].max()
    np.testing.assert_allclose(found[3], found[0], rtol=1e-5)  # no more than there is room for


@torch.inference_mode()
def test_both_kinds_of_queries_count_alike(llama: PreTrainedModel) -> None:
    prompt = prompt_of(150)
    heads = {0: (1,), 2: (0, 2)}
    methods = [ScoringMethod(heads, Reduction.MEAN, queries) for queries in Queries]
    draft = as_draft(copy.deepcopy(llama))
    ahead, question, both = (
        Scorer(draft, 8, 64, POOL, method=method).score([prompt])[0] for method in methods
    )
    np.testing.assert_allclose(both, (ahead + question) / 2, rtol=1e-4, atol=1e-7)
