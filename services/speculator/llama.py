"""A forward pass of models of Llama's shape, straight from their weights.

The arithmetic is that of transformers' `modeling_llama`. A pass over a single token is mostly calls
of modules there: in a small model on a CPU they take a third of it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from transformers.models.mistral.modeling_mistral import MistralAttention

from .attention import AttentionHook, ReadChunk
from .reading import AttentionRule

SHAPED_ALIKE = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM)


class Projection(NamedTuple):
    """Arguments of `functional.linear` behind the input."""

    weight: Tensor
    bias: Tensor | None


class Rotation(NamedTuple):
    """Rotary positions, [tokens, 1, head_dim] both.

    The first half of the sines has its sign flipped, so that `roll(x) * signed_sin` is
    `rotate_half(x) * sin`.
    """

    cos: Tensor
    signed_sin: Tensor


class Layer(NamedTuple):
    """One decoder layer. No copies: the tensors are the model's own."""

    number: int
    rule: AttentionRule
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
class Llama:
    """A model whose layers are Llama's, ready to run without its modules."""

    embedding: Tensor  # [vocabulary, hidden]
    layers: tuple[Layer, ...]
    norm: Tensor
    head: Projection
    rotary: nn.Module
    head_dim: int
    eps: float

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> Llama | None:
        """Return the model's weights; None for a model of another shape."""
        if not isinstance(model, SHAPED_ALIKE) or model.config.hidden_act != "silu":
            return None
        decoder: Any = model.model
        if not all(type(each) is nn.Linear for layer in decoder.layers for each in _linears(layer)):
            return None  # quantised weights are not plain numbers
        return cls(
            embedding=decoder.embed_tokens.weight,
            layers=tuple(map(_layer, decoder.layers)),
            norm=decoder.norm.weight,
            head=_projection(model.lm_head),
            rotary=decoder.rotary_emb,
            head_dim=decoder.layers[0].self_attn.head_dim,
            eps=decoder.norm.variance_epsilon,
        )

    def up_to(self, layer: int) -> Llama:
        """Return the model without the layers behind `layer`: it has no logits."""
        return replace(self, layers=tuple(each for each in self.layers if each.number <= layer))

    def read(self, ids: Tensor, positions: Tensor, reading: ReadChunk) -> None:
        """Store every layer's keys and values of packed tokens, `[tokens]` both.

        Only what keys depend on is computed: in the last layer not even a query, but for questions.
        """
        hidden, turn = self._embed(ids, positions)
        for layer in self.layers[:-1]:
            hidden = self._run_layer(layer, hidden, turn, reading)
        last = self.layers[-1]
        normed = self._normalize(hidden, last.norm)
        key = self._project_heads(normed, last.key, turn)
        reading.store(last.number, key, self._project_heads(normed, last.value))
        if reading.reads_questions:
            reading.record(last.number, self._project_heads(normed, last.query, turn))

    def logits(self, ids: Tensor, positions: Tensor, attending: AttentionHook) -> Tensor:
        """Return the logits after each token: [tokens, vocabulary]."""
        hidden, turn = self._embed(ids, positions)
        for layer in self.layers:
            hidden = self._run_layer(layer, hidden, turn, attending)
        return functional.linear(self._normalize(hidden, self.norm), *self.head)

    def _embed(self, ids: Tensor, positions: Tensor) -> tuple[Tensor, Rotation]:
        hidden = functional.embedding(ids, self.embedding)
        cos, sin = self.rotary(hidden, positions[None])
        first, second = sin.chunk(2, dim=-1)
        return hidden, Rotation(
            cos.transpose(0, 1), torch.cat((-first, second), -1).transpose(0, 1)
        )

    def _run_layer(
        self, layer: Layer, hidden: Tensor, turn: Rotation, attending: AttentionHook
    ) -> Tensor:
        """Return the layer's output, in place of its input: [tokens, hidden]."""
        normed = self._normalize(hidden, layer.norm)
        seen = attending.attend(
            layer.number,
            self._project_heads(normed, layer.query, turn),
            self._project_heads(normed, layer.key, turn),
            self._project_heads(normed, layer.value),
            layer.rule,
        )
        hidden += functional.linear(seen[0].transpose(0, 1).flatten(1), *layer.output)
        normed = self._normalize(hidden, layer.feed_norm)
        fed = functional.silu(functional.linear(normed, *layer.gate), inplace=True)
        fed *= functional.linear(normed, *layer.up)
        hidden += functional.linear(fed, *layer.down)
        return hidden

    def _normalize(self, hidden: Tensor, weight: Tensor) -> Tensor:
        return functional.rms_norm(hidden, weight.shape, weight, self.eps)

    def _project_heads(
        self, normed: Tensor, projection: Projection, turn: Rotation | None = None
    ) -> Tensor:
        """Return [1, heads, tokens, head_dim], at its positions."""
        states = functional.linear(normed, *projection).view(len(normed), -1, self.head_dim)
        if turn is not None:
            rolled = states.roll(self.head_dim // 2, dims=-1)
            states = torch.addcmul(states * turn.cos, rolled, turn.signed_sin)
        return states.transpose(0, 1)[None]


def _linears(module: Any) -> tuple[nn.Module, ...]:
    attention, network = module.self_attn, module.mlp
    return (
        *(attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj),
        *(network.gate_proj, network.up_proj, network.down_proj),
    )


def _layer(module: Any) -> Layer:
    attention, network = module.self_attn, module.mlp
    return Layer(
        number=attention.layer_idx,
        rule=AttentionRule(attention.scaling, _window(attention)),
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


def _window(attention: Any) -> int | None:
    """Return the layer's window, where transformers' attention function gets it from."""
    if isinstance(attention, MistralAttention):
        window: int | None = attention.config.sliding_window
        return window
    return getattr(attention, "sliding_window", None)  # Llama's has none


def _projection(module: nn.Linear) -> Projection:
    return Projection(module.weight, module.bias)
