"""Starts the main model as the trained speculator in a larger shape, computing the same function.

The idea is Net2Net's (Chen et al., 2016): hidden units, heads and MLP units are copied and their
outputs shared out; further layers start as the identity. What the small model learned in cheap
steps need not be learned again in expensive ones. A little noise lets the copies part.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer


def grow(
    small: LlamaForCausalLM, large: LlamaForCausalLM, generator: torch.Generator, noise: float
) -> None:
    """Overwrite the weights of `large`, whose every size is a multiple of that of `small`.

    `noise` is in units of each weight's own standard deviation.

    Both have the same head size and vocabulary; `large` has at least as many layers.
    """
    with torch.no_grad():
        width = large.config.hidden_size // small.config.hidden_size
        embedding = small.model.embed_tokens.weight
        large.model.embed_tokens.weight.copy_(embedding.repeat(1, width))
        # Tied embeddings: each logit is the sum of `width` copies.
        large.model.norm.weight.copy_(small.model.norm.weight.repeat(width) / width)
        for index, layer in enumerate(large.model.layers):
            if index < len(small.model.layers):
                _grow_layer(small.model.layers[index], layer, small.config.head_dim, width)
            else:
                _begin_as_identity(layer)
        for weight in large.parameters():
            weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)


def _grow_layer(small: LlamaDecoderLayer, large: LlamaDecoderLayer, head: int, width: int) -> None:
    large.input_layernorm.weight.copy_(small.input_layernorm.weight.repeat(width))
    large.post_attention_layernorm.weight.copy_(small.post_attention_layernorm.weight.repeat(width))
    ours, theirs = small.self_attn, large.self_attn
    for name in ("q_proj", "k_proj", "v_proj"):
        source, target = getattr(ours, name).weight, getattr(theirs, name).weight
        target.copy_(_more_heads(source, head, target.shape[0]).repeat(1, width) / width)
    columns = _more_heads(ours.o_proj.weight.T, head, theirs.o_proj.weight.shape[1]).T
    copies = columns.shape[1] // ours.o_proj.weight.shape[1]
    theirs.o_proj.weight.copy_(columns.repeat(width, 1) / copies)
    copies = large.mlp.gate_proj.weight.shape[0] // small.mlp.gate_proj.weight.shape[0]
    for name in ("gate_proj", "up_proj"):
        source, target = getattr(small.mlp, name).weight, getattr(large.mlp, name).weight
        target.copy_(source.repeat(copies, width) / width)
    down = small.mlp.down_proj.weight
    large.mlp.down_proj.weight.copy_(down.repeat(width, copies) / copies)


def _more_heads(rows: Tensor, head: int, wanted_rows: int) -> Tensor:
    """Copy every head's rows beside themselves, so that copies share a key-value head."""
    copies = wanted_rows // rows.shape[0]
    heads = rows.reshape(-1, head, rows.shape[1])
    return heads.repeat_interleave(copies, dim=0).reshape(wanted_rows, rows.shape[1])


def carry_over(
    earlier: LlamaForCausalLM,
    earlier_tokens: dict[str, int],
    later: LlamaForCausalLM,
    later_tokens: dict[str, int],
    generator: torch.Generator,
) -> None:
    """Overwrite the weights of `later`, which has other tokens and may have further layers.

    A token that both know keeps its embedding; the others' are drawn like those of `earlier`.
    """
    with torch.no_grad():
        _carry_embedding(
            earlier.model.embed_tokens.weight,
            later.model.embed_tokens.weight,
            [
                (earlier_tokens[text], later_tokens[text])
                for text in earlier_tokens.keys() & later_tokens.keys()
            ],
            generator,
        )
        later.model.norm.load_state_dict(earlier.model.norm.state_dict())
        for index, layer in enumerate(later.model.layers):
            if index < len(earlier.model.layers):
                layer.load_state_dict(earlier.model.layers[index].state_dict())
            else:
                _begin_as_identity(layer)


def _carry_embedding(
    source: Tensor, target: Tensor, pairs: Sequence[tuple[int, int]], generator: torch.Generator
) -> None:
    drawn = torch.randn(target.shape, generator=generator)
    target.copy_(source.mean(dim=0) + source.std(dim=0) * drawn)
    theirs, ours = (torch.tensor(side) for side in zip(*pairs, strict=True))
    target[ours] = source[theirs]


def _begin_as_identity(layer: LlamaDecoderLayer) -> None:
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
