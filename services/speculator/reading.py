"""One prompt in the draft model: its keys and values, and the queries recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """What a layer's attention does beside softmax."""

    scaling: float  # of the logits
    window: int | None = None  # a token sees itself and window - 1 before it; None: all


@dataclass(frozen=True, slots=True)
class DraftKvLayout:
    """The KV layout of one token in a draft model, in every layer alike."""

    layers: tuple[int, ...]  # the layers' own numbers, in the order of computation
    rules: tuple[AttentionRule, ...]  # per layer
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        dims = self.key_dim + self.value_dim
        return int(len(self.layers) * self.kv_heads * dims * self.dtype.itemsize)

    @property
    def last_layer(self) -> int:
        return self.layers[-1]

    @property
    def scoring_layers(self) -> tuple[int, ...]:
        """The layers that see the whole prompt."""
        pairs = zip(self.layers, self.rules, strict=True)
        return tuple(layer for layer, rule in pairs if rule.window is None)

    def up_to(self, layer: int) -> DraftKvLayout:
        """Return the layout of the layers up to `layer`."""
        count = sum(each <= layer for each in self.layers)
        return replace(self, layers=self.layers[:count], rules=self.rules[:count])

    def empty(self, dim: int, tokens: int) -> Tensor:
        """Return [layers, kv_heads, tokens, dim], not initialised."""
        shape = (len(self.layers), self.kv_heads, tokens, dim)
        return torch.empty(shape, dtype=self.dtype, device=self.device)


class Block(NamedTuple):
    """The KV of some neighbouring tokens, in memory of its own."""

    keys: Tensor  # [layers, kv_heads, tokens, key_dim]
    values: Tensor  # [layers, kv_heads, tokens, value_dim]


class Reading:
    """One prompt's KV, the queries that look at it, and the next greedy token.

    Buffers are allocated once and filled in place: a cache grown by concatenation copies the
    whole prompt's KV at every chunk and every look-ahead step.
    """

    def __init__(
        self,
        prompt: tuple[int, ...],
        layout: DraftKvLayout,
        capacity: int,
        salt: str | None = None,
        *,
        question_tokens: int = 0,
        looks_ahead: bool = True,
        echo: tuple[int, ...] = (),
    ) -> None:
        """Allocate the buffers.

        `question_tokens` of the prompt's end have their queries recorded as they are read; or those
        of `echo`, which repeats behind the prompt what it asks, where its end does not. A prompt
        whose draft does not look ahead is read to its end; else the last token is fed with those
        that are generated.
        """
        self.prompt = prompt
        self.echo = echo
        self.salt = salt
        self.question_start = len(prompt) if echo else max(0, len(prompt) - question_tokens)
        self.looks_ahead = looks_ahead
        self.layout = layout
        self.keys = layout.empty(layout.key_dim, capacity)  # after RoPE
        self.values = layout.empty(layout.value_dim, capacity)
        # Per layer, after RoPE: [heads, key_dim] of each token fed alone, [heads, tokens, key_dim]
        # of the question's.
        self.queries: list[list[Tensor]] = [[] for _ in layout.layers]
        self.question: list[list[Tensor]] = [[] for _ in layout.layers]
        self.length = 0  # tokens read so far, prompt and look-ahead
        self.cached_tokens = 0  # of these, taken from the prefix cache
        self.next_token = prompt[-1]  # fed next, once the rest of the prompt is read
        self.certainties: list[float] = []  # probability of each greedy token

    @property
    def certainty(self) -> float:
        """The probability of the least sure of the generated tokens, in [0, 1].

        Where the draft hesitates at one token, it may look at the wrong place.
        """
        return min(self.certainties, default=0.0)

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens whose keys are still missing, before the last one if it is fed alone."""
        return max(0, len(self.prompt) - int(self.looks_ahead) - self.length)

    def next_tokens(self, count: int) -> tuple[int, ...]:
        """Return the next tokens to read: of the prompt, and once that is read, of the echo."""
        start = self.length - len(self.prompt)
        if start < 0:
            return self.prompt[self.length : self.length + count]
        return self.echo[start : start + count]

    def forget_look_ahead(self) -> None:
        """Continue behind the prompt, as if nothing had been generated; the queries stay."""
        self.length = len(self.prompt)

    def reads_question(self, tokens: int) -> bool:
        """Return True if the next tokens reach into the question."""
        return self.length + tokens > self.question_start

    def record_question(self, row: int, query: Tensor) -> None:
        """Keep one layer's `[heads, tokens, key_dim]` of the next tokens, the question's alone."""
        skipped = max(0, self.question_start - self.length)
        self.question[row].append(query[:, skipped:].clone())

    def question_queries(self, row: int) -> Tensor:
        """Return one layer's queries of the question's tokens, [heads, tokens, key_dim]."""
        last = [] if self.echo else self.queries[row][:1]
        fed_alone = [query[:, None] for query in last]
        return torch.cat([*self.question[row], *fed_alone], dim=1)

    def store(self, row: int, key: Tensor, value: Tensor) -> None:
        """Put one layer's `[kv_heads, tokens, dim]` after what was read."""
        stop = self.length + key.shape[1]
        self.keys[row, :, self.length : stop] = key
        self.values[row, :, self.length : stop] = value

    def restore(self, blocks: Sequence[Block]) -> None:
        """Start from KV that was computed before: the prompt's first tokens."""
        if not blocks:
            return
        tokens = sum(block.keys.shape[2] for block in blocks)
        torch.cat([block.keys for block in blocks], dim=2, out=self.keys[:, :, :tokens])
        torch.cat([block.values for block in blocks], dim=2, out=self.values[:, :, :tokens])
        self.length = self.cached_tokens = tokens

    def block(self, start: int, stop: int) -> Block:
        """Return a copy of the KV of tokens `[start, stop)`."""
        return Block(self.keys[:, :, start:stop].clone(), self.values[:, :, start:stop].clone())

    def release(self) -> None:
        """Free the memory; nothing can be read any more."""
        self.keys = self.values = self.keys.new_empty(0)
        self.queries = self.question = []
