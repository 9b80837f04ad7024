"""Starts a Llama with an induction circuit in its first two layers: training starts with copying.

Induction (Olsson et al., "In-context Learning and Induction Heads", 2022) finds the earlier place
that looks like the present one, and copies what came next. Small models spend most of their
training before they find it; here the weights start with a rough one, and training makes it exact.

The hidden state is cut into four blocks: the token itself, then the tokens one, two and three
places back, which the first layer's heads fetch. The second layer compares the token and its
predecessor with the two predecessors of every earlier place, and copies what stands there.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

OFFSETS = (1, 2, 3)  # tokens back; one key-value head of the first layer each
PHASE_PAIRS = 4  # RoPE's fastest frequencies separate neighbours
CONTENT_PAIRS = 6  # its slowest leave content alone over thousands of tokens
CONSTANT = 0.5  # one embedding column, the same for all tokens
OWN_SCALE, OTHER_SCALE = (
    5.0,
    0.3,
)  # of the random embedding inside and outside the token's own block
RANDOM_SCALE = 0.1  # of what the random weights add to the hidden state
FETCH_GAIN, MATCH_GAIN, COPY_GAIN = 0.1, 2.0, 0.5


@dataclass(frozen=True, slots=True)
class CircuitShape:
    """The rows and columns of the circuit."""

    width: int  # of a block of the hidden state
    head: int
    kv_heads: int
    group: int  # query heads per key-value head
    theta: float

    def block(self, offset: int) -> slice:
        return slice(offset * self.width, (offset + 1) * self.width)

    def key_rows(self, kv_head: int) -> slice:
        return slice(kv_head * self.head, (kv_head + 1) * self.head)

    def query_rows(self, kv_head: int) -> slice:
        """Return the rows of the group's first query head; the others stay random."""
        start = kv_head * self.group * self.head
        return slice(start, start + self.head)

    def content_rows(self) -> torch.Tensor:
        """Return rows within a head: both halves of the slowest pairs."""
        slow = torch.arange(self.head // 2 - CONTENT_PAIRS, self.head // 2)
        return torch.cat([slow, slow + self.head // 2])


def start_with_induction(model: LlamaForCausalLM, generator: torch.Generator) -> None:
    """Write the circuit over the model's random weights."""
    shape = _shape(model.config)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= RANDOM_SCALE
            layer.mlp.down_proj.weight *= RANDOM_SCALE
        _split_embedding(model.model.embed_tokens.weight, shape)
        _look_back(model, shape, generator)
        _match_and_copy(model, shape, generator)


def _shape(config: LlamaConfig) -> CircuitShape:
    return CircuitShape(
        width=config.hidden_size // (1 + len(OFFSETS)),
        head=config.head_dim,
        kv_heads=config.num_key_value_heads,
        group=config.num_attention_heads // config.num_key_value_heads,
        theta=config.rope_parameters["rope_theta"],
    )


def _split_embedding(weight: torch.Tensor, shape: CircuitShape) -> None:
    weight[:, : shape.width] *= OWN_SCALE
    weight[:, shape.width :] *= OTHER_SCALE
    weight[:, 0] = CONSTANT


def _look_back(model: LlamaForCausalLM, shape: CircuitShape, generator: torch.Generator) -> None:
    """Set the first layer: keys have the phase of their place, queries that of the one before."""
    attention = model.model.layers[0].self_attn
    half = shape.head // 2
    read = _orthogonal(shape.head, shape.width, generator)
    attention.o_proj.weight.zero_()
    for kv_head, offset in enumerate(OFFSETS):
        query, key = shape.query_rows(kv_head), shape.key_rows(kv_head)
        for pair in range(PHASE_PAIRS):
            angle = torch.tensor(-offset * shape.theta ** (-pair / half))
            attention.q_proj.weight[query.start + pair, 0] = torch.cos(angle)
            attention.q_proj.weight[query.start + pair + half, 0] = torch.sin(angle)
            attention.k_proj.weight[key.start + pair, 0] = 1.0
        attention.v_proj.weight[key, shape.block(0)] += read
        attention.o_proj.weight[shape.block(offset), query] += FETCH_GAIN * read.T


def _match_and_copy(
    model: LlamaForCausalLM, shape: CircuitShape, generator: torch.Generator
) -> None:
    """Set the second layer: (token, one back) of the query against (one, two back) of the keys."""
    attention = model.model.layers[1].self_attn
    content = shape.content_rows()
    for kv_head in range(shape.kv_heads):
        query, key = shape.query_rows(kv_head), shape.key_rows(kv_head)
        last, before = (
            MATCH_GAIN * _orthogonal(len(content), shape.width, generator) for _ in range(2)
        )
        attention.q_proj.weight[query.start + content, shape.block(0)] += last
        attention.q_proj.weight[query.start + content, shape.block(1)] += before
        attention.k_proj.weight[key.start + content, shape.block(1)] += last
        attention.k_proj.weight[key.start + content, shape.block(2)] += before
        read = _orthogonal(shape.head, shape.width, generator)
        attention.v_proj.weight[key, shape.block(0)] += read
        attention.o_proj.weight[shape.block(0), query] += COPY_GAIN * read.T


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> torch.Tensor:
    """Return orthonormal rows, blind to the constant column."""
    square = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0]
    matrix = square[:rows].clone()
    matrix[:, 0] = 0.0
    return matrix
