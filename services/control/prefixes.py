"""Remembers recently computed prompt prefixes, to predict prefix-cache hits.

Pure. Prefix caches work by blocks of tokens, and so does this memory of them.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ..core.prefix_digests import BLOCK_TOKENS
from .stages import Curve

SMOOTHING = 0.1  # weight of the newest prompt in how far the memory is trusted


class DigestMemory:
    """Chained block digests, see `core.prefix_digests`, with LRU eviction."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def remember(self, digests: Sequence[int]) -> list[int]:
        """Remember a prefix just computed or used; return the digests that were evicted for it."""
        for digest in reversed(digests):
            self._blocks[digest] = None  # its end first: that is what engines evict first, too
            self._blocks.move_to_end(digest)
        surplus = max(0, len(self._blocks) - self._max_blocks)
        return [self._blocks.popitem(last=False)[0] for _ in range(surplus)]

    def longest_match(self, digests: Iterable[int]) -> int:
        """Count the leading blocks that are remembered."""
        return sum(1 for _ in itertools.takewhile(self._blocks.__contains__, digests))


class PrefixMemory:
    """Remembers the prefixes of token lists that end at a block boundary."""

    def __init__(self, max_blocks: int, block_tokens: int = BLOCK_TOKENS) -> None:
        self._block_tokens = block_tokens
        self._blocks = DigestMemory(max_blocks)

    def remember(self, digests: Sequence[int], tokens: int) -> None:
        """Remember a prompt's first `tokens` tokens: their KV was just computed or used."""
        self._blocks.remember(digests[: tokens // self._block_tokens])

    def longest_match(self, digests: Sequence[int], tokens: int) -> int:
        """Count the remembered ones of a prompt's first `tokens` tokens, in whole blocks.

        An engine always computes the last token of a prompt, so never all of them.
        """
        within = digests[: max(0, tokens - 1) // self._block_tokens]
        return self._block_tokens * self._blocks.longest_match(within)


class Turn(NamedTuple):
    """A pruned prompt that a later one may extend."""

    tokens: int  # N
    kept: int  # k


class TurnMemory:
    """Remembers how much pruned prompts kept, to predict what their next turns carry over."""

    def __init__(self, max_turns: int) -> None:
        self._max_turns = max_turns
        self._turns: OrderedDict[int, Turn] = OrderedDict()

    def remember(self, digests: Sequence[int], turn: Turn) -> None:
        """Remember a prompt under its whole blocks but the last: its end may differ next time."""
        if len(digests) < 2:
            return
        self._turns[digests[-2]] = turn
        self._turns.move_to_end(digests[-2])
        if len(self._turns) > self._max_turns:
            self._turns.popitem(last=False)

    def last_turn(self, digests: Sequence[int], tokens: int) -> Turn | None:
        """Return the longest remembered prompt that one of `tokens` tokens seems to extend."""
        turns = (self._turns.get(digest) for digest in reversed(digests))
        return next((turn for turn in turns if turn is not None and turn.tokens < tokens), None)


class CacheForecast:
    """Predicts a pool's prefix-cache hits, weighted by how often the prediction was right.

    The memory may be wrong: replicas have caches of their own, and evict. How often it is right is
    learnt, and a cached prefix counts by that share.
    """

    def __init__(self, memory: PrefixMemory) -> None:
        self._memory = memory
        self._trust = 1.0

    def cached_tokens(self, digests: Sequence[int], tokens: int) -> int:
        """Return how many of a prompt's first `tokens` tokens should be cached."""
        return self._memory.longest_match(digests, tokens)

    def seconds(self, curve: Curve, tokens: int, cached: int) -> float:
        """Return the expected time of `tokens`, of which `cached` should be cached."""
        warm_s = curve.seconds(tokens - cached, cached)
        return self._trust * warm_s + (1.0 - self._trust) * curve.seconds(tokens)

    def expected_tokens(self, cached: int) -> int:
        """Return how many tokens are cached on average where `cached` should be."""
        return int(self._trust * cached)

    def learn(self, digests: Sequence[int], tokens: int, cached: int) -> None:
        """Learn that of a prompt's first `tokens` tokens all but `cached` were computed."""
        foreseen = self._memory.longest_match(digests, tokens)
        if foreseen > 0:
            self._trust += SMOOTHING * (min(1.0, cached / foreseen) - self._trust)
        self._memory.remember(digests, tokens)
