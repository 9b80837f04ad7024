"""One token after another through a model of Llama's shape, straight from its weights.

A forward pass over one token is mostly calls of modules: in a small model on a CPU they take more
than half of it. The arithmetic is that of transformers' `modeling_llama`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    LlamaForCausalLM,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2ForCausalLM,
)

from .attention import Attending

SHAPED_ALIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)


class Projection(NamedTuple):
    """Arguments of `functional.linear` behind the input."""

    weight: Tensor
    bias: Tensor | None


class Layer(NamedTuple):
    """One decoder layer. No copies: the tensors are the model's own."""

    number: int
    scaling: float  # of the attention logits
    norm: Tensor
    query: Projection
    key: Projection
    value: Projection
    output: Projection
    feed_norm: Tensor
    gate: Projection
    up: Projection
    down: Projection


@dataclass(frozen=True, slots=True)
class LlamaSteps:
    """Feeds single tokens to a model whose layers are Llama's."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Projection
    rotary: nn.Module
    head_dim: int
    eps: float

    @classmethod
    def of(cls, model: PreTrainedModel) -> LlamaSteps | None:
        """None for a model of another shape."""
        if not isinstance(model, SHAPED_ALIKE) or model.config.hidden_act != "silu":
            return None
        decoder: Any = model.model
        return cls(
            embedding=decoder.embed_tokens.weight,
            layers=tuple(map(_layer, decoder.layers)),
            norm=decoder.norm.weight,
            head=_projection(model.lm_head),
            rotary=decoder.rotary_emb,
            head_dim=decoder.layers[0].self_attn.head_dim,
            eps=decoder.norm.variance_epsilon,
        )

    def logits(
        self, tokens: Sequence[int], positions: Sequence[int], attending: Attending
    ) -> Tensor:
        """After each token, which are of different prompts: [tokens, vocabulary]."""
        device = self.embedding.device
        hidden = functional.embedding(torch.tensor(tokens, device=device), self.embedding)
        cos, sin = self.rotary(hidden, torch.tensor([positions], device=device))
        turned = _signed(sin)
        for layer in self.layers:
            normed = functional.rms_norm(hidden, layer.norm.shape, layer.norm, self.eps)
            query, key, value = (
                self._heads(functional.linear(normed, *each))
                for each in (layer.query, layer.key, layer.value)
            )
            seen = attending.attend(
                layer.number,
                _rotated(query, cos, turned),
                _rotated(key, cos, turned),
                value,
                layer.scaling,
            )
            flat = seen[0].transpose(0, 1).reshape(len(tokens), -1)
            hidden = hidden + functional.linear(flat, *layer.output)
            normed = functional.rms_norm(hidden, layer.feed_norm.shape, layer.feed_norm, self.eps)
            gate = functional.silu(functional.linear(normed, *layer.gate))
            fed = gate * functional.linear(normed, *layer.up)
            hidden = hidden + functional.linear(fed, *layer.down)
        normed = functional.rms_norm(hidden, self.norm.shape, self.norm, self.eps)
        return functional.linear(normed, *self.head)

    def _heads(self, projected: Tensor) -> Tensor:
        """[tokens, heads * head_dim] -> [1, heads, tokens, head_dim]."""
        return projected.view(1, len(projected), -1, self.head_dim).transpose(1, 2)


def _layer(module: Any) -> Layer:
    attention, network = module.self_attn, module.mlp
    return Layer(
        number=attention.layer_idx,
        scaling=attention.scaling,
        norm=module.input_layernorm.weight,
        query=_projection(attention.q_proj),
        key=_projection(attention.k_proj),
        value=_projection(attention.v_proj),
        output=_projection(attention.o_proj),
        feed_norm=module.post_attention_layernorm.weight,
        gate=_projection(network.gate_proj),
        up=_projection(network.up_proj),
        down=_projection(network.down_proj),
    )


def _projection(module: nn.Linear) -> Projection:
    return Projection(module.weight, module.bias)


def _signed(sin: Tensor) -> Tensor:
    """So that `roll(x) * signed` is `rotate_half(x) * sin`."""
    first, second = sin.chunk(2, dim=-1)
    return torch.cat((-first, second), dim=-1)


def _rotated(states: Tensor, cos: Tensor, turned: Tensor) -> Tensor:
    """Rotary positions, [1, heads, tokens, head_dim]."""
    return torch.addcmul(states * cos, states.roll(states.shape[-1] // 2, dims=-1), turned)
