"""Which prompt prefixes were prefilled lately, so that a cached prefix can be foreseen.

Pure. The engines' prefix caches work by blocks of tokens, and so does this memory of them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
import xxhash


class PrefixMemory:
    """Digests of prefixes that end at a block boundary; the least recently used go first."""

    def __init__(self, block_tokens: int, max_blocks: int) -> None:
        self._block_tokens = block_tokens
        self._max_blocks = max_blocks
        self._blocks: OrderedDict[int, None] = OrderedDict()

    def remember(self, tokens: Sequence[int]) -> None:
        """The KV of these tokens, a prompt's beginning, was just computed or used."""
        for digest in reversed(list(prefix_digests(tokens, self._block_tokens))):
            self._blocks[digest] = None  # its end first: that is what engines evict first, too
            self._blocks.move_to_end(digest)
        while len(self._blocks) > self._max_blocks:
            self._blocks.popitem(last=False)

    def longest(self, tokens: Sequence[int]) -> int:
        """How many leading tokens of `tokens` are remembered, in whole blocks.

        An engine always computes the last token of a prompt, so never all of them.
        """
        found = 0
        for digest in prefix_digests(tokens[: len(tokens) - 1], self._block_tokens):
            if digest not in self._blocks:
                break
            found += self._block_tokens
        return found


def prefix_digests(tokens: Sequence[int], block_tokens: int) -> Iterator[int]:
    """One digest per whole block; each stands for all tokens up to its block's end."""
    packed = np.asarray(tokens, dtype=np.uint32)
    digest = 0
    for start in range(0, len(packed) - block_tokens + 1, block_tokens):
        block = packed[start : start + block_tokens].tobytes()
        digest = xxhash.xxh3_64_intdigest(block, seed=digest)
        yield digest
