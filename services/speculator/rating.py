"""Reduces the attention that a reading has recorded to one score per prompt token."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..core.selection import Scores
from .method import Reduction, ScoringMethod
from .reading import Reading

SCORING_BUFFER = 1 << 24  # attention weights held at once, in float32 elements: 64 MiB


def rate(reading: Reading, method: ScoringMethod, pool_tokens: int) -> Scores:
    """Return [N] float32: pooled attention, reduced over heads, then its mean over the queries.

    Where what is asked is echoed behind the prompt, it alone asks, whatever the method's queries:
    a draft that looks ahead behind a tool's results knows less of it. Layers that see a window of
    the prompt do not count: they cannot look where a fact is.
    """
    with torch.inference_mode():
        rated = []
        if method.looks_ahead and not reading.echo:
            rated.append(_rate(reading, method, pool_tokens, in_prompt=False))
        if method.asks_question or reading.echo:
            rated.append(_rate(reading, method, pool_tokens, in_prompt=True))
        scores: Scores = torch.stack(rated).mean(dim=0).cpu().numpy()
    return scores


def _rate(reading: Reading, method: ScoringMethod, pool_tokens: int, *, in_prompt: bool) -> Tensor:
    """Return [N] by the question's queries (`in_prompt`, or its echo's), or the look-ahead's."""
    reduced, count = torch.zeros((), device=reading.keys.device), 0
    for row, layer in enumerate(reading.layout.layers):
        if layer not in reading.layout.scoring_layers or not method.counts(layer):
            continue
        queries = (
            reading.question_queries(row) if in_prompt else torch.stack(reading.queries[row], dim=1)
        )
        heads = method.heads_of(layer)
        sees_itself = in_prompt and not reading.echo
        for weights in attention_of(reading, row, queries, heads, in_prompt=sees_itself):
            pooled = average_pool(weights, pool_tokens)
            count += len(pooled)
            if method.reduction is Reduction.MAXIMUM:
                reduced = torch.maximum(reduced, pooled.amax(dim=0))
                continue
            power = 2 if method.reduction is Reduction.SQUARES else 1
            reduced = reduced + pooled.pow(power).sum(dim=0)
    if method.reduction is not Reduction.MAXIMUM:
        reduced = reduced / count
    return reduced.mean(dim=0)


def attention_of(
    reading: Reading, row: int, queries: Tensor, heads: Sequence[int] | None, *, in_prompt: bool
) -> Iterator[Tensor]:
    """Yield one layer's attention to the prompt, [heads, queries, N] float32, a few heads at once.

    Generated tokens are not keys: the softmax is over the prompt alone. `queries` is `[heads,
    queries, key_dim]`; `heads` None: all of the layer's. `in_prompt`: the queries are those of the
    prompt's last tokens, none of which sees what is behind it.
    """
    layout, prompt_tokens = reading.layout, len(reading.prompt)
    steps, keys = queries.shape[1], reading.keys[row, :, :prompt_tokens]
    if heads is None:  # a group of heads reads its keys once
        grouped = queries.reshape(layout.kv_heads, -1, layout.key_dim)
    else:
        group = len(queries) // layout.kv_heads
        grouped, keys = queries[list(heads)], keys[[head // group for head in heads]]
    unseen = torch.ones(steps, steps, dtype=torch.bool, device=queries.device).triu(diagonal=1)
    at_once = max(1, SCORING_BUFFER // (grouped.shape[1] * prompt_tokens))
    for some, theirs in zip(grouped.split(at_once), keys.split(at_once), strict=True):
        logits = some.float() @ theirs.float().transpose(1, 2) * layout.rules[row].scaling
        logits = logits.view(-1, steps, prompt_tokens)
        if in_prompt:
            logits[:, :, -steps:].masked_fill_(unseen, -torch.inf)
        yield logits.softmax(dim=-1)


def average_pool(weights: Tensor, width: int) -> Tensor:
    """Average `width` neighbours along the last dimension, with zeros beyond the ends.

    Equal to `avg_pool1d(weights, width, stride=1, padding=width // 2)` for an odd width, which on
    a CPU takes eight times as long.
    """
    length = weights.shape[-1]
    if weights.device.type != "cpu":
        return functional.avg_pool1d(weights, width, stride=1, padding=width // 2)[..., :length]
    padded = functional.pad(weights, (width // 2, width // 2))
    total = padded[..., :length].clone()
    for shift in range(1, width):
        total += padded[..., shift : shift + length]
    return total / width
