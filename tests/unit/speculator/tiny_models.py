"""Tiny draft models with random weights, and prompts for them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specprefill.core.selection import Scores, select
from specprefill.core.types import Plan, PlanKind, Reason, Selection
from specprefill.speculator.draft import (
    Draft,
)
from specprefill.speculator.scorer import Scorer
from tests.policies import PAPER

VOCABULARY = 97
POLICY = replace(PAPER, chunk_tokens=8, min_kept_tokens=8, sink_tokens=2, tail_tokens=4)
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
POOL = 13

SHAPES = {
    "llama-mha": (LlamaConfig, LlamaForCausalLM, {"heads": 4, "kv_heads": 4, "head_dim": 16}),
    "llama-gqa2": (LlamaConfig, LlamaForCausalLM, {"heads": 4, "kv_heads": 2, "head_dim": 8}),
    "qwen2-gqa4": (Qwen2Config, Qwen2ForCausalLM, {"heads": 4, "kv_heads": 1, "head_dim": 8}),
    "qwen3-gqa2": (Qwen3Config, Qwen3ForCausalLM, {"heads": 4, "kv_heads": 2, "head_dim": 32}),
}


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


def prompt_of(tokens: int, seed: int = 0) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(0, VOCABULARY, tokens).tolist())


def scorer_of(draft: Draft, chunk: int = 64, look_ahead: int = 8) -> Scorer:
    return Scorer(draft, look_ahead, chunk, POOL)


def chosen(scores: Scores) -> Selection:
    return select(scores, PLAN, (), POLICY)
