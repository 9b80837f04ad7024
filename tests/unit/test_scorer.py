"""The scorer against a plain eager reference: one whole forward pass, weights read off it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specprefill.config import SpeculatorConfig
from specprefill.errors import UnsupportedModel
from specprefill.selection import Scores, SelectionPolicy, select
from specprefill.speculator.attention import causal_attention
from specprefill.speculator.draft import (
    Draft,
    as_draft,
    look,
    read_chunk,
    refuse_unsupported_cache,
)
from specprefill.speculator.llama import Llama
from specprefill.speculator.reading import Reading
from specprefill.speculator.scorer import Scorer, average_pool, load_scorer
from specprefill.types import Plan, PlanKind, Reason, Selection

VOCABULARY = 97
POLICY = SelectionPolicy(chunk_tokens=8, min_kept_tokens=8, sink_tokens=2, tail_tokens=4)
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
POOL = 13

SHAPES = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"heads": 4, "kv_heads": 4, "head_dim": 16}),
    "llama-gqa2": (LlamaConfig, LlamaForCausalLM, {"heads": 4, "kv_heads": 2, "head_dim": 8}),
    "qwen2-gqa4": (Qwen2Config, Qwen2ForCausalLM, {"heads": 4, "kv_heads": 1, "head_dim": 8}),
    "qwen3-gqa2": (Qwen3Config, Qwen3ForCausalLM, {"heads": 4, "kv_heads": 2, "head_dim": 32}),
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(kind: type[PreTrainedConfig], **more: Any) -> PreTrainedConfig:
    heads = more.pop("heads", 4)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 8 * heads,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": heads,
        "num_key_value_heads": more.pop("kv_heads", 2),
        "head_dim": 8,
        "initializer_range": 0.3,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    return kind(**(settings | more))


def tiny_model(name: str) -> PreTrainedModel:
    kind, model, shape = SHAPES[name]
    if kind is Qwen2Config:  # it knows no head_dim of its own
        shape = {key: value for key, value in shape.items() if key != "head_dim"}
    torch.manual_seed(1)
    return model(tiny_config(kind, **shape)).eval()


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return tiny_model("llama-gqa2")


def prompt_of(tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist())


def scorer_of(draft: Draft, chunk: int = 64, look_ahead: int = 8) -> Scorer:
    return Scorer(draft, look_ahead, chunk, POOL)


def chosen(scores: Scores) -> Selection:
    return select(scores, PLAN, (), POLICY)


@torch.inference_mode()
def reference_scores(
    model: PreTrainedModel, prompt: tuple[int, ...], look_ahead: int, eos: frozenset[int]
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
    weights = torch.cat(output.attentions)[:, :, len(prompt) - 1 :, : len(prompt)]
    weights = weights / weights.sum(dim=-1, keepdim=True)  # the softmax over the prompt alone
    layers, heads, steps, length = weights.shape
    pooled = functional.avg_pool1d(weights.reshape(-1, steps, length), POOL, 1, POOL // 2)
    highest = pooled.view(layers * heads, steps, length).amax(dim=0)
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
    with scorer.opened([prompt]) as readings:
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
    with scorer.opened([prompt_of(100), prompt_of(60)]) as (left, stays):

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
    with scorer.opened([prompt_of(tokens) for tokens in (21, 31, 41, 1)]) as readings:
        scorer.read(readings)
    assert passes == [[20, 30, 14], [26]]


def test_the_last_layer_stops_a_pass_that_only_reads(llama: PreTrainedModel) -> None:
    ended: list[torch.nn.Module] = []
    scorer = scorer_of(replace(as_draft(llama), quick=None))
    hook = llama.model.layers[-1].mlp.register_forward_hook(lambda module, *_: ended.append(module))
    try:
        with scorer.opened([prompt_of(100)]) as readings:
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
    told = []
    for quick in (None, draft.quick):
        scorer = scorer_of(replace(draft, quick=quick))
        with scorer.opened([prompt_of(40), prompt_of(71)]) as readings, torch.inference_mode():
            scorer.read(readings)
            logits = look(draft.model, readings, quick)
            queries = torch.stack(readings[1].queries[-1])
            told.append([each.float() for each in (logits, queries, readings[1].keys[:, :, :71])])
    close = 1e-5 if dtype is torch.float32 else 3e-2
    for theirs, ours in zip(*told, strict=True):
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
    monkeypatch.setattr("specprefill.speculator.scorer.SCORING_BUFFER", 1)
    (by_head,) = scorer.score([prompt_of(90)])
    np.testing.assert_allclose(by_head, whole, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config(MistralConfig, sliding_window=64), "DynamicSlidingWindowLayer"),
        (tiny_config(GptOssConfig), "DynamicSlidingWindowLayer"),
        (
            tiny_config(
                LlamaConfig,
                rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
            ),
            "dynamic",
        ),
    ],
)
def test_models_that_do_not_keep_every_key_are_refused(
    config: PreTrainedConfig, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        refuse_unsupported_cache(config)


def test_recurrent_models_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="mamba"):
        refuse_unsupported_cache(MambaConfig(num_hidden_layers=2))


def test_attention_with_a_soft_cap_is_refused() -> None:
    config = tiny_config(
        Gemma2Config, attn_logit_softcapping=0.5, layer_types=["full_attention"] * 3
    )
    with pytest.raises(UnsupportedModel, match="gemma2"):
        as_draft(Gemma2ForCausalLM(config).eval())


def test_random_weights_are_built_from_the_configuration_alone(tmp_path: Path) -> None:
    tiny_config(LlamaConfig, eos_token_id=[7, 9]).save_pretrained(tmp_path)
    config = SpeculatorConfig(
        path=str(tmp_path), random_weights=True, dtype="bfloat16", device="cpu"
    )
    first, second = load_scorer(config, POOL), load_scorer(config, POOL)
    assert first.draft.eos_ids == {7, 9}
    assert first.max_prompt_tokens == 2048 - 7
    assert first.vocabulary_size == VOCABULARY
    assert first.draft.model.dtype is torch.bfloat16
    (scores,) = first.score([prompt_of(80)])
    assert np.array_equal(scores, second.score([prompt_of(80)])[0])


def remembering(llama: PreTrainedModel, memory_bytes: int = 1 << 30) -> Scorer:
    return Scorer(as_draft(llama), 8, 64, POOL, memory_bytes)


def score_and_remember(scorer: Scorer, prompt: tuple[int, ...]) -> tuple[Scores, int]:
    """The scores, and how many tokens were not computed for them."""
    with scorer.opened([prompt]) as readings:
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
        with scorer.opened([prompt]) as readings:
            in_use = sum(each.keys.nbytes + each.values.nbytes for each in readings)
            assert in_use == scorer.kv_bytes(len(prompt))
            assert in_use + scorer.prefix.bytes_held <= scorer.memory_bytes
            scorer.read(readings)
            scorer.look_ahead(readings)
            scorer.remember(readings)
            assert in_use + scorer.prefix.bytes_held <= scorer.memory_bytes
    assert scorer.prefix.bytes_held > 0


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
    with scorer.opened([prompt]) as (reading,):
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
    (all_named,) = Scorer(draft, 8, 64, POOL, heads=every).score([prompt])
    np.testing.assert_allclose(all_named, expected, rtol=1e-5)
    singles = [
        Scorer(draft, 8, 64, POOL, heads={layer: (head,)}).score([prompt])[0]
        for layer, heads in every.items()
        for head in heads
    ]
    assert all((single <= expected + 1e-6).all() for single in singles)
    assert len({single.tobytes() for single in singles}) == len(singles)


@pytest.mark.parametrize(
    ("heads", "message"),
    [({99: (0,)}, "no layer 99"), ({0: (99,)}, "heads 0 to"), ({0: ()}, "heads 0 to")],
)
def test_heads_that_the_draft_lacks_are_refused(
    tmp_path: Path, llama: PreTrainedModel, heads: dict[int, tuple[int, ...]], message: str
) -> None:
    llama.save_pretrained(tmp_path)
    config = SpeculatorConfig(path=str(tmp_path), dtype="float32", score_heads=heads)
    with pytest.raises(UnsupportedModel, match=message):
        load_scorer(config, POOL)
