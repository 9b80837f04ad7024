"""Counts the arithmetic of a model's prefill from its configuration alone.

transformers builds the model without memory (torch's meta device), and its weights are counted,
so that no architecture's formula is assumed. Weights are not read, and vLLM is not asked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PreTrainedConfig

from ..core.errors import UnsupportedModel
from ..core.flops import AttentionLayers, PrefillFlops

# transformers' names for one number.
_EXPERTS_A_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts"),
    *("moe_top_k", "moe_topk", "moe_k"),
)
_SIZES = (
    *("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("head_dim", "hidden_size"),
)
_EXPERTS = ("num_experts", "n_routed_experts", "num_local_experts", "moe_num_experts")
_WITHOUT_KEYS = ("linear", "mamba", "conv", "recurrent", "moe", "mlp", "hybrid_linear")


def count_flops(folder: Path | str) -> PrefillFlops:
    """Return the arithmetic of the model in `folder`.

    Raises UnsupportedModel where transformers has no class for it.
    """
    try:
        text = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
        with torch.device("meta"):
            model = AutoModel.from_config(text)
    except (ValueError, OSError, KeyError, ImportError) as error:
        raise UnsupportedModel(f"{folder}: its arithmetic is not known: {error}") from error
    return PrefillFlops(_active_weights(model, text), tuple(_attention_layers(text)))


def _active_weights(model: nn.Module, text: PreTrainedConfig) -> int:
    looked_up = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters()
    }
    active = sum(
        parameter.numel() * (_routed_share(text) if ".experts." in name else 1.0)
        for name, parameter in model.named_parameters()
        if id(parameter) not in looked_up
    )
    return int(active)


def _routed_share(text: PreTrainedConfig) -> float:
    """Return the share of the routed experts' weights that multiply one token."""
    settings = text.to_dict()
    routed, experts = (
        next((settings[key] for key in names if settings.get(key)), None)
        for names in (_EXPERTS_A_TOKEN, _EXPERTS)
    )
    if routed is None or experts is None:
        raise UnsupportedModel(f"{text.model_type}: the experts per token are not known")
    return float(min(1.0, routed / experts))


def _attention_layers(text: PreTrainedConfig) -> Iterator[AttentionLayers]:
    """Yield the layers that attend, grouped by their window."""
    width = _width(text)
    for window, layers in Counter(_windows(text)).items():
        if width:
            yield AttentionLayers(layers, width, window)


def _windows(text: PreTrainedConfig) -> Iterator[int | None]:
    settings: dict[str, Any] = text.to_dict()
    kinds = settings.get("layer_types") or getattr(text, "layers_block_type", None)
    window, chunk = settings.get("sliding_window"), settings.get("attention_chunk_size")
    if kinds is None:
        on = settings.get("use_sliding_window", True)
        yield from [window if on else None] * text.num_hidden_layers
        return
    for kind in kinds:
        if "sliding" in kind:
            yield window
        elif "chunked" in kind:
            yield chunk
        elif not any(word in kind for word in _WITHOUT_KEYS):
            yield None


def _width(text: PreTrainedConfig) -> int:
    """Return the query heads times the mean of the sizes of keys and values; 0 without heads."""
    heads = getattr(text, "num_attention_heads", None)
    if not isinstance(heads, int):
        return 0
    size = {name: getattr(text, name, None) or 0 for name in _SIZES}
    if size["kv_lora_rank"]:  # latent attention, computed with whole heads
        key = size["qk_nope_head_dim"] + size["qk_rope_head_dim"]
        return int(heads * (key + (size["v_head_dim"] or key)) // 2)
    return int(heads * (size["head_dim"] or size["hidden_size"] // heads))
