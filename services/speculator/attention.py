"""The draft model's attention: SDPA over a KV buffer of our own that records queries.

Registered with transformers by name, so that no model is patched. All state of a forward pass is
in the `attending` keyword argument that the model hands through to its attention layers: nothing
is shared between scorers or calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface

from ..core.errors import UnsupportedModel
from .reading import AttentionRule, DraftKvLayout, Reading

NAME = "specprefill"


def register() -> None:
    """Make `attn_implementation="specprefill"` known to transformers. Idempotent."""
    AttentionInterface.register(NAME, attend)


class KeysStored(Exception):
    """Ends a forward pass in its last layer: every key is stored, the output is not needed."""


class AttentionHook(Protocol):
    """The work of a forward pass at each attention layer."""

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """Attend to `[1, heads, tokens, dim]` each, of the new tokens; return the same shape."""
        ...


@dataclass(frozen=True, slots=True)
class ReadChunk:
    """Stores the keys and values of some prompts' next tokens, packed one after the other.

    Of the question's tokens it records the queries. In the last layer nothing else is needed, so
    the pass ends there by raising KeysStored: that layer's attention and feed-forward network, and
    all behind them, are never computed.
    """

    parts: Sequence[tuple[Reading, int]]  # and how many tokens of each

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """See `AttentionHook`. Raises KeysStored in the last layer."""
        self.store(layer, key, value)
        self.record(layer, query)
        layout = self.parts[0][0].layout
        if layer == layout.last_layer:
            raise KeysStored
        row = layout.layers.index(layer)
        outputs = [
            _attend_stored(reading, row, query[:, :, part], rule)
            for reading, part in self._slices()
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def store(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Keep one layer's `[1, kv_heads, tokens, dim]`."""
        row = self.parts[0][0].layout.layers.index(layer)
        for reading, part in self._slices():
            reading.store(row, key[0, :, part], value[0, :, part])

    @property
    def reads_questions(self) -> bool:
        """True if the pass reads some prompt's question."""
        return any(reading.reads_question(tokens) for reading, tokens in self.parts)

    def record(self, layer: int, query: Tensor) -> None:
        """Keep the questions' queries of one layer's `[1, heads, tokens, dim]`."""
        row = self.parts[0][0].layout.layers.index(layer)
        for reading, part in self._slices():
            if reading.reads_question(part.stop - part.start):
                reading.record_question(row, query[0, :, part])

    def _slices(self) -> Iterator[tuple[Reading, slice]]:
        """Yield the slice of each prompt's tokens in the pack."""
        start = 0
        for reading, tokens in self.parts:
            yield reading, slice(start, start + tokens)
            start += tokens


@dataclass(frozen=True, slots=True)
class QueryRecorder:
    """Feeds one token of each reading and records its query in every layer."""

    readings: Sequence[Reading]

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """See `AttentionHook`."""
        row = self.readings[0].layout.layers.index(layer)
        outputs = []
        for index, reading in enumerate(self.readings):
            own = slice(index, index + 1)
            reading.store(row, key[0, :, own], value[0, :, own])
            reading.queries[row].append(query[0, :, index].clone())
            outputs.append(_attend_stored(reading, row, query[:, :, own], rule))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


@dataclass(frozen=True, slots=True)
class LayoutProbe:
    """Plain causal attention that notes each layer's shapes."""

    seen: dict[int, tuple[AttentionRule, int, int, int]] = field(default_factory=dict)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, rule: AttentionRule
    ) -> Tensor:
        """See `AttentionHook`."""
        self.seen[layer] = (rule, key.shape[1], key.shape[3], value.shape[3])
        return causal_attention(query, key, value, 0, rule.scaling)

    def layout(self, dtype: torch.dtype, device: torch.device) -> DraftKvLayout:
        """Return the model's layout. Raises UnsupportedModel unless its layers are alike."""
        if not self.seen:
            raise UnsupportedModel(
                "speculator: the model has no attention layer that can be recorded"
            )
        rules, *shapes = zip(*self.seen.values(), strict=True)
        if any(len(set(sizes)) > 1 for sizes in shapes):
            raise UnsupportedModel("speculator: the attention layers have keys of different shapes")
        kv_heads, key_dim, value_dim = (sizes[0] for sizes in shapes)
        layers = tuple(self.seen)
        return DraftKvLayout(layers, rules, kv_heads, key_dim, value_dim, dtype, device)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _attention_mask: Tensor | None,
    scaling: float | None = None,
    attending: AttentionHook | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_ignored: Any,
) -> tuple[Tensor, None]:
    """Serve as transformers' attention function; several prompts' tokens come packed in one row.

    `query` is `[1, heads, tokens, head_dim]`, `key` and `value` hold the new tokens only.
    Prompts attend one by one, each to its own buffer, so that lengths differ without padding.
    Returns `[1, tokens, heads, head_dim]`.
    """
    if attending is None:
        raise UnsupportedModel("speculator: the model does not reach its attention with our state")
    if softcap is not None:
        raise UnsupportedModel("speculator: attention with a soft cap is not supported")
    if s_aux is not None:
        raise UnsupportedModel("speculator: attention with learned sinks is not supported")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rule = AttentionRule(scale, sliding_window)
    output = attending.attend(_layer_index(module), query, key, value, rule)
    return output.transpose(1, 2).contiguous(), None


def _attend_stored(reading: Reading, row: int, query: Tensor, rule: AttentionRule) -> Tensor:
    """Attend causally to what is stored, the newest tokens included, within the layer's window."""
    stop = reading.length + query.shape[2]
    start = 0 if rule.window is None else max(0, reading.length + 1 - rule.window)
    keys = reading.keys[row, None, :, start:stop]
    values = reading.values[row, None, :, start:stop]
    past = reading.length - start
    if rule.window is None or stop - start <= rule.window:  # it does not bind
        return causal_attention(query, keys, values, past, rule.scaling)
    return _window_attention(query, keys, values, past, rule)


def _window_attention(
    query: Tensor, keys: Tensor, values: Tensor, past: int, rule: AttentionRule
) -> Tensor:
    """Attend from the last tokens of `past + tokens` to at most `rule.window` of them each."""
    tokens = query.shape[2]
    places = torch.arange(past + tokens, device=query.device)
    distance = places[past:, None] - places
    mask = (distance >= 0) & (distance < (rule.window or len(places)))
    return functional.scaled_dot_product_attention(
        query, keys, values, attn_mask=mask, scale=rule.scaling, enable_gqa=True
    )


def _layer_index(module: nn.Module) -> int:
    index = module.layer_idx
    if not isinstance(index, int):
        raise UnsupportedModel("speculator: the model does not number its attention layers")
    return index


def causal_attention(
    query: Tensor, keys: Tensor, values: Tensor, past: int, scaling: float
) -> Tensor:
    """Attend from the last `tokens` of `past + tokens` positions, grouped-query.

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
    """Reshape [1, heads, tokens, d] to [1, kv_heads, group * tokens, d], a key once per group."""
    return query.reshape(1, kv_heads, -1, query.shape[3])


def _attention_in_two_parts(
    query: Tensor, keys: Tensor, values: Tensor, past: int, scaling: float
) -> Tensor:
    """Attend to past keys without a mask, to own keys causally; merge by log-sum-exp.

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
