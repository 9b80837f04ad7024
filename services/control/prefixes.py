"""Which prompt prefixes were computed lately, so that a cached prefix can be foreseen.

Pure. Prefix caches work by blocks of tokens, and so does this memory of them.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import xxhash

from .stages import Curve

SMOOTHING = 0.1  # weight of the newest prompt in how far the memory is trusted


class DigestMemory:
    """Chained block digests, see `prefix_digests`; the least recently used go first."""

    def __init__(self, max_blocks: int) -> None:
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[int]:
        return iter(self._blocks)

    def remember(self, digests: Sequence[int]) -> list[int]:
        """A prefix was just computed or used; returns the digests that were forgotten for it."""
        for digest in reversed(digests):
            self._blocks[digest] = None  # its end first: that is what engines evict first, too
            self._blocks.move_to_end(digest)
        surplus = max(0, len(self._blocks) - self._max_blocks)
        return [self._blocks.popitem(last=False)[0] for _ in range(surplus)]

    def longest(self, digests: Iterable[int]) -> int:
        """How many leading blocks are remembered."""
        return sum(1 for _ in itertools.takewhile(self._blocks.__contains__, digests))


class PrefixMemory:
    """The prefixes of token lists that end at a block boundary."""

    def __init__(self, block_tokens: int, max_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._blocks = DigestMemory(max_blocks)

    def remember(self, tokens: Sequence[int]) -> None:
        """The KV of these tokens, a prompt's beginning, was just computed or used."""
        self._blocks.remember(list(prefix_digests(tokens, self._block_tokens)))

    def longest(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of `tokens` are remembered, in whole blocks.

        An engine always computes the last token of a prompt, so never all of them.
        """
        digests = prefix_digests(tokens[: len(tokens) - 1], self._block_tokens)
        return self._block_tokens * self._blocks.longest(digests)


class CacheForecast:
    """What a pool's prefix caches should hold of a prompt, and how far that can be trusted.

    The memory may be wrong: replicas have caches of their own, and evict. How often it is right is
    learnt, and a cached prefix counts by that share.
    """

    def __init__(self, memory: PrefixMemory) -> None:
        self._memory = memory
        self._trust = 1.0

    def cached(self, tokens: Sequence[int]) -> int:
        """How many leading tokens should be cached."""
        return self._memory.longest(tokens)

    def seconds(self, curve: Curve, tokens: int, cached: int) -> float:
        """Expected time of `tokens`, of which `cached` should be cached."""
        warm_s = curve.seconds(tokens - cached, cached)
        return self._trust * warm_s + (1.0 - self._trust) * curve.seconds(tokens)

    def learn(self, tokens: Sequence[int], cached: int) -> None:
        """These tokens were computed, all but `cached` of them."""
        foreseen = self._memory.longest(tokens)
        if foreseen > 0:
            self._trust += SMOOTHING * (min(1.0, cached / foreseen) - self._trust)
        self._memory.remember(tokens)


def prefix_digests(tokens: Sequence[int], block_tokens: int) -> Iterator[int]:
    """One digest per whole block; each stands for all tokens up to its block's end."""
    packed = np.asarray(tokens, dtype=np.uint32)
    digest = 0
    for start in range(0, len(packed) - block_tokens + 1, block_tokens):
        block = packed[start : start + block_tokens].tobytes()
        digest = xxhash.xxh3_64_intdigest(block, seed=digest)
        yield digest
