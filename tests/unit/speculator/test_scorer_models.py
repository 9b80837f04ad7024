"""Draft models that the scorer takes, and those that it refuses."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
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
from tests.unit.speculator.tiny_models import (
    POOL,
    VOCABULARY,
    prompt_of,
    scorer_of,
    tiny_config,
)

pytestmark = pytest.mark.usefixtures("one_thread")


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
