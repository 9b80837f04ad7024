"""Draft models that the scorer takes, and those that it refuses."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    Exaone4Config,
    Exaone4ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    JambaConfig,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    MistralForCausalLM,
    Olmo3Config,
    Olmo3ForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
)

from specprefill.config import SpeculatorConfig
from specprefill.core.errors import UnsupportedModel
from specprefill.core.types import Reason
from specprefill.speculator.draft import (
    as_draft,
    max_positions,
    refuse_unsupported_cache,
)
from specprefill.speculator.scorer import load_scorer
from tests.unit.speculator.test_scorer import reference_scores
from tests.unit.speculator.tiny_models import (
    POOL,
    VOCABULARY,
    prompt_of,
    scorer_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")

FULL = ["full_attention"] * 3


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (tiny_config(MistralConfig, sliding_window=64), "every layer of mistral sees a window"),
        (tiny_config(JambaConfig), "layer 0 of jamba is neither"),
        (
            tiny_config(Llama4TextConfig, attention_chunk_size=16),
            "layer 0 of llama4_text is neither",
        ),
        (T5Config(), "t5 is an encoder-decoder model"),
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


@pytest.mark.parametrize(
    ("config", "kind", "reason"),
    [
        (tiny_config(Gemma2Config, layer_types=FULL), Gemma2ForCausalLM, "soft cap"),
        (
            tiny_config(GptOssConfig, layer_types=FULL, num_local_experts=2, num_experts_per_tok=1),
            GptOssForCausalLM,
            "learned sinks",
        ),
    ],
)
def test_attention_that_is_no_plain_softmax_is_refused(
    config: PreTrainedConfig, kind: type[PreTrainedModel], reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        as_draft(kind(config).eval())


WINDOWED = {
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"query_pre_attn_scalar": 8}),
    "cohere2": (Cohere2Config, Cohere2ForCausalLM, {}),
    "exaone4": (Exaone4Config, Exaone4ForCausalLM, {}),
    "olmo3": (Olmo3Config, Olmo3ForCausalLM, {}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"use_sliding_window": True}),
}
WINDOW = 16


def windowed_model(name: str) -> PreTrainedModel:
    """A model whose middle layer sees a window of the prompt."""
    config, model, more = WINDOWED[name]
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(1)
    return model(tiny_config(config, sliding_window=WINDOW, layer_types=kinds, **more)).eval()


@pytest.mark.parametrize("tokens", [5, WINDOW, WINDOW + 1, 131])
@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_drafts_score_with_the_layers_that_see_all(name: str, tokens: int) -> None:
    model = windowed_model(name)
    draft = as_draft(model)
    assert draft.layout.scoring_layers == (0, 2)
    prompt = prompt_of(tokens, seed=tokens)
    expected, _ = reference_scores(model, prompt, 8, frozenset(), layers=(0, 2))
    for chunk in (7, 64, 1000):
        (scores,) = scorer_of(draft, chunk=chunk).score([prompt])
        np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-6)


def test_a_batch_of_a_windowed_draft_equals_single_requests() -> None:
    scorer = scorer_of(as_draft(windowed_model("gemma3")))
    prompts = [prompt_of(tokens, seed=tokens) for tokens in (40, 150, 3)]
    for prompt, scores in zip(prompts, scorer.score(prompts), strict=True):
        np.testing.assert_allclose(scores, scorer.score([prompt])[0], rtol=1e-4, atol=1e-7)


def test_the_quick_pass_of_a_windowed_draft_is_used_and_equal() -> None:
    draft = as_draft(windowed_model("qwen2"))
    assert draft.quick is not None
    slow = replace(draft, quick=None)
    prompt = prompt_of(90)
    (quick,), (plain,) = (scorer_of(each).score([prompt]) for each in (draft, slow))
    np.testing.assert_allclose(quick, plain, rtol=1e-4, atol=1e-7)


def test_a_window_that_no_prompt_outgrows_counts_as_none() -> None:
    torch.manual_seed(1)
    model = MistralForCausalLM(tiny_config(MistralConfig, sliding_window=2048)).eval()
    draft = as_draft(model)
    assert draft.layout.scoring_layers == (0, 1, 2)
    assert model.config.sliding_window == 2048


def test_heads_of_a_windowed_layer_are_refused(tmp_path: Path) -> None:
    windowed_model("qwen2").save_pretrained(tmp_path)
    config = SpeculatorConfig(path=str(tmp_path), dtype="float32", score_heads={1: (0,)})
    with pytest.raises(UnsupportedModel, match=r"layer 1 sees a window .* choose among 0, 2"):
        load_scorer(config, POOL)


CONFIGURATIONS = {
    "an empty folder": (None, "cannot be loaded: "),
    "an unknown architecture": ({"model_type": "no-such"}, "cannot be loaded: .*no-such"),
    "code of its own": (
        {"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}},
        "brings code of its own",
    ),
    "no weights": ("llama", "cannot be loaded: .*model.safetensors"),
    "an encoder": ({"model_type": "vit"}, "cannot be loaded: "),
    "a quantisation that is not installed": (
        {"quantization_config": {"quant_method": "hqq"}}, "cannot be loaded: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_what_transformers_cannot_load_is_refused_with_its_reason(
    tmp_path: Path, name: str
) -> None:
    written, reason = CONFIGURATIONS[name]
    if written is not None:
        tiny_config(LlamaConfig).save_pretrained(tmp_path)
        file = tmp_path / "config.json"
        settings = json.loads(file.read_text()) | (written if isinstance(written, dict) else {})
        file.write_text(json.dumps(settings))
    config = SpeculatorConfig(path=str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match=f"speculator: {tmp_path} .*{reason}"):
        load_scorer(config, POOL)


def test_a_draft_without_a_tokenizer_is_refused(
    tmp_path: Path, llama: PreTrainedModel, root: Path
) -> None:
    llama.save_pretrained(tmp_path)
    config = SpeculatorConfig(path=str(tmp_path), dtype="float32", device="cpu")
    with pytest.raises(UnsupportedModel, match=f"the tokenizer of {tmp_path} cannot be loaded"):
        load_scorer(config, POOL, str(root / "models" / "demo-main"))


def test_weights_that_are_not_plain_are_read_through_the_modules(llama: PreTrainedModel) -> None:
    class Packed(torch.nn.Linear):
        """A linear layer whose weight is not the matrix that it applies, as quantised ones."""

        def forward(self, given: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.linear(given, -self.weight)

    packed = copy.deepcopy(llama)
    for layer in packed.model.layers:
        plain = layer.mlp.down_proj
        layer.mlp.down_proj = Packed(plain.in_features, plain.out_features, bias=False)
        layer.mlp.down_proj.weight = torch.nn.Parameter(-plain.weight)
    draft = as_draft(packed)
    assert draft.quick is None
    (scores,), (wanted,) = (
        scorer_of(each).score([prompt_of(60)]) for each in (draft, as_draft(llama))
    )
    np.testing.assert_allclose(scores, wanted, rtol=1e-4, atol=1e-7)


def test_the_longest_prompt_of_a_draft_with_learned_positions_is_known() -> None:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=64, n_embd=16, n_layer=2, n_head=2,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    scorer = scorer_of(as_draft(GPT2LMHeadModel(config).eval()), look_ahead=8)
    assert scorer.max_prompt_tokens == 64 - 7
    assert scorer.refusal(57) is None
    assert scorer.refusal(58) is Reason.PROMPT_TOO_LONG_FOR_SPECULATOR
    (scores,) = scorer.score([prompt_of(57)])
    assert len(scores) == 57


@pytest.mark.parametrize("name", ["n_positions", "max_seq_len", "model_max_length"])
def test_the_number_of_positions_is_read_under_every_name(name: str) -> None:
    class Other(PreTrainedConfig):
        pass

    assert max_positions(Other(**{name: 77})) == 77
    assert max_positions(Other()) is None
    assert max_positions(LlamaConfig(max_position_embeddings=99)) == 99


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
