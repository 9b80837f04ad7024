"""Finds prompts that start alike: blocks of tokens, by a digest of all tokens up to their end.

Pure: the caller defines what a block holds.
"""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Generic, TypeVar

from .lru import ByteLru

DIGEST_BYTES = 16

V = TypeVar("V")


def prompt_digest(prompt: Sequence[int], salt: str | None = None) -> bytes:
    """Digest the whole prompt. Not to be forged: other users' prompts lie beside it."""
    return _digest(_salted(salt), _bytes(prompt))


def block_digests(prompt: Sequence[int], block_tokens: int, salt: str | None = None) -> list[bytes]:
    """Return one digest per whole block, over the previous one and the block's own tokens.

    Prompts of different salts have none in common.
    """
    digests, before = [], _salted(salt)
    for start in range(0, len(prompt) - block_tokens + 1, block_tokens):
        block = _bytes(prompt[start : start + block_tokens])
        before = _digest(before, block)
        digests.append(before)
    return digests


class PrefixCache(Generic[V]):
    """Blocks of equal size under a byte budget, least recently used first to go.

    A block is never used later than the blocks before it, so a forgotten
    prompt loses its end first, and no unreachable block stays.
    """

    def __init__(self, block_tokens: int, block_bytes: int, max_bytes: int) -> None:
        self.block_tokens = block_tokens
        self._block_bytes = block_bytes
        self._blocks: ByteLru[V] = ByteLru(max_bytes)

    @property
    def bytes_held(self) -> int:
        return self._blocks.bytes_held

    def find_longest(self, prompt: Sequence[int], salt: str | None = None) -> list[V]:
        """Return the blocks of the longest known beginning, short of the last token.

        The last token is always computed: somebody has to ask the question.
        """
        known = []
        for digest in block_digests(prompt[:-1], self.block_tokens, salt):
            if digest not in self._blocks:
                break
            known.append(digest)
        blocks = [self._blocks.get(digest) for digest in reversed(known)]
        return [block for block in reversed(blocks) if block is not None]

    def count_known(self, prompt: Sequence[int], salt: str | None = None) -> int:
        """Count the tokens of the prompt's longest known beginning; what is used stays as it is."""
        digests = block_digests(prompt[:-1], self.block_tokens, salt)
        known = itertools.takewhile(self._blocks.__contains__, digests)
        return self.block_tokens * sum(1 for _ in known)

    def add(
        self,
        prompt: Sequence[int],
        max_bytes: int,
        block: Callable[[int], V],
        salt: str | None = None,
    ) -> None:
        """Hold the prompt's whole blocks, `block(index)` each, and no more than `max_bytes`."""
        most = max_bytes // self._block_bytes
        digests = block_digests(prompt, self.block_tokens, salt)[:most]
        missing = [index for index, digest in enumerate(digests) if digest not in self._blocks]
        for digest in reversed(digests):
            self._blocks.get(digest)
        self.shrink(max_bytes - len(missing) * self._block_bytes)
        for index in reversed(missing):
            self._blocks.put(digests[index], block(index), self._block_bytes)
        for digest in reversed(digests):
            self._blocks.get(digest)

    def shrink(self, max_bytes: int) -> None:
        """Forget until no more than `max_bytes` are held."""
        self._blocks.shrink(max_bytes)


def _salted(salt: str | None) -> bytes:
    """Return what the digests of prompts with `salt` start from."""
    return b"" if salt is None else _digest(b"salt", salt.encode())


def _digest(before: bytes, content: bytes) -> bytes:
    return blake2b(before + content, digest_size=DIGEST_BYTES).digest()


def _bytes(tokens: Sequence[int]) -> bytes:
    return array("q", tokens).tobytes()
