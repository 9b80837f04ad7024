"""The draft model's attention: SDPA over a KV buffer of our own that records queries.

Registered with transformers by name, so that no model is patched. All state of a forward pass is
in the `readings` keyword argument that the model hands through to its attention layers: nothing is
shared between scorers or calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from ..errors import UnsupportedModel

NAME = "specprefill"


def register() -> None:
    """Make `attn_implementation="specprefill"` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attend)


class LayerReading:
    """One layer's KV of one request, and the queries recorded from it.

    Buffers are allocated once and filled in place: a cache grown by concatenation copies the
    whole prompt's KV at every chunk and every look-ahead step.
    """

    def __init__(self, key: Tensor, value: Tensor, capacity: int, scaling: float) -> None:
        self.keys = key.new_empty((*key.shape[:2], capacity, key.shape[3]))
        self.values = value.new_empty((*value.shape[:2], capacity, value.shape[3]))
        # keys, values: [1, kv_heads, capacity, head_dim], the model's dtype
        self.queries: list[Tensor] = []  # [heads, head_dim] each, after RoPE
        self.scaling = scaling
        self.length = 0

    def append(self, key: Tensor, value: Tensor) -> None:
        """Add `[1, kv_heads, tokens, head_dim]`."""
        stop = self.length + key.shape[2]
        self.keys[:, :, self.length : stop] = key
        self.values[:, :, self.length : stop] = value
        self.length = stop


class Reading:
    """One request on its way through the draft model: its KV, its queries, its last token."""

    def __init__(self, prompt: tuple[int, ...], capacity: int) -> None:
        self.prompt = prompt
        self.capacity = capacity  # prompt and look-ahead tokens
        self.layers: dict[int, LayerReading] = {}
        self.recording = False  # True: keep the query of each forward pass's last token
        self.next_token = -1  # greedy, after the last forward pass
        self.length = 0  # tokens read so far, prompt and look-ahead

    def attend(
        self, layer_index: int, query: Tensor, key: Tensor, value: Tensor, scaling: float
    ) -> Tensor:
        """Store the new keys and values, and attend causally to all so far.

        `query` is `[1, heads, tokens, head_dim]`, and so is what returns.
        """
        layer = self.layers.get(layer_index)
        if layer is None:
            layer = LayerReading(key, value, self.capacity, scaling)
            self.layers[layer_index] = layer
        past = layer.length
        layer.append(key, value)
        if self.recording:
            layer.queries.append(query[0, :, -1].clone())
        keys, values = layer.keys[:, :, : layer.length], layer.values[:, :, : layer.length]
        return causal_attention(query, keys, values, past, scaling)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    readings: Sequence[Reading] | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function; one reading per row of the batch.

    `query` is `[rows, heads, tokens, head_dim]`, `key` and `value` hold the new tokens only.
    Rows attend one by one, each to its own buffer, so that lengths differ without any padding.
    Returns `[rows, tokens, heads, head_dim]`.
    """
    if readings is None:
        raise UnsupportedModel("speculator: the model does not reach its attention with our state")
    index = _layer_index(module)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rows = [
        reading.attend(index, query[row, None], key[row, None], value[row, None], scale)
        for row, reading in enumerate(readings)
    ]
    output = rows[0] if len(rows) == 1 else torch.cat(rows)
    return output.transpose(1, 2).contiguous(), None


def _layer_index(module: nn.Module) -> int:
    index = module.layer_idx
    if not isinstance(index, int):
        raise UnsupportedModel("speculator: the model does not number its attention layers")
    return index


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, past: int, scaling: float
) -> Tensor:
    """Attention of the last `tokens` of `past + tokens` positions, grouped-query.

    `query` is `[1, heads, tokens, head_dim]`, `keys` is `[1, kv_heads, past + tokens, head_dim]`.
    """
    tokens = query.shape[2]
    if tokens == 1:
        grouped = _group(query, keys.shape[1])
        output = functional.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
        return output.reshape(*query.shape[:3], values.shape[3])
    if past == 0:
        return functional.scaled_dot_product_attention(
            query, keys, values, is_causal=True, scale=scaling, enable_gqa=True
        )
    if query.device.type == "cpu" and keys.shape[3] == values.shape[3]:
        return _attention_in_two_parts(query, keys, values, past, scaling)
    mask = causal_lower_right(tokens, past + tokens)
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=scaling, enable_gqa=True
    )


def _group(query: Tensor, kv_heads: int) -> Tensor:
    """[1, heads, tokens, d] -> [1, kv_heads, group * tokens, d]: each key is read once a group."""
    return query.reshape(1, kv_heads, -1, query.shape[3])


def _attention_in_two_parts(
    query: Tensor, keys: Tensor, values: Tensor, past: int, scaling: float
) -> Tensor:
    """Past keys without a mask, own keys causally, merged by their log-sum-exp.

    On a CPU this takes 0.7 of the time of one call with a mask, and no memory for the mask, which
    at 128k tokens would be 1 GiB a layer.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    grouped = _group(query, keys.shape[1])
    before, before_lse = flash(grouped, keys[:, :, :past], values[:, :, :past], scale=scaling)
    own, own_lse = flash(
        query, keys[:, :, past:], values[:, :, past:], is_causal=True, scale=scaling
    )
    weight = torch.sigmoid(before_lse.reshape(own_lse.shape) - own_lse).unsqueeze(-1)
    merged = torch.lerp(own.float(), before.reshape(own.shape).float(), weight)
    return merged.to(query.dtype)
