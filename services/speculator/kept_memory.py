"""Remembers what prompts kept, so that the next turn of a conversation can keep it too."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from ..core.carry_over import KeptBefore
from ..core.types import Reason, Selection, Span
from .lru import ByteLru
from .prefix_memory import block_digests

BLOCK_TOKENS = 128
# What opens an answer, the next turn's prompt may lack; of longer openings, this many tokens.
MOST_OPENING_TOKENS = 64
_BRANCHES = 32  # prompts of equal beginnings that are remembered, the newest
_TOKEN_BYTES, _RUN_BYTES, _ENTRY_BYTES = 8, 64, 256


@dataclass(frozen=True, slots=True)
class _Entry:
    """One prompt: what it kept, and its tokens behind the blocks that stand for it."""

    tail: tuple[int, ...]
    opening_tokens: int  # the last of the tail
    runs: tuple[Span, ...]
    keep: float | None

    @property
    def size(self) -> int:
        return _TOKEN_BYTES * len(self.tail) + _RUN_BYTES * len(self.runs) + _ENTRY_BYTES


class KeptMemory:
    """What pruned prompts kept, under a byte budget; the least recently used goes first.

    A prompt is found by those that extend it, be it without the opening of its answer. It is filed
    under its whole blocks but the last, so that its last tokens need not be a whole block.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: ByteLru[tuple[_Entry, ...]] = ByteLru(max_bytes)

    def remember(
        self,
        prompt: Sequence[int],
        selection: Selection,
        asked: Reason,
        salt: str | None = None,
        opening_tokens: int = 0,
    ) -> None:
        """Remember a pruned selection of `prompt`, `[N]`; `asked` is its plan's first reason.

        The next turn may lack the last `opening_tokens`. Prompts shorter than two blocks and dense
        selections are not remembered.
        """
        blocks = len(prompt) // BLOCK_TOKENS - 1
        if blocks < 1 or selection.kept_tokens == len(prompt):
            return
        digest = block_digests(prompt[: blocks * BLOCK_TOKENS], BLOCK_TOKENS, salt)[-1]
        keep = selection.plan.keep if asked is Reason.ASKED else None
        tail = tuple(prompt[blocks * BLOCK_TOKENS :])
        entry = _Entry(tail, min(opening_tokens, MOST_OPENING_TOKENS), selection.runs, keep)
        known = self._entries.get(digest) or ()
        others = tuple(each for each in known if each.tail != entry.tail)
        sizes = accumulate(each.size for each in (entry, *others))
        fitting = sum(size <= self._max_bytes for size in sizes)
        if fitting == 0:
            return
        entries = (entry, *others)[: min(fitting, _BRANCHES)]
        self._entries.put(digest, entries, sum(each.size for each in entries))

    def find(self, prompt: Sequence[int], salt: str | None = None) -> KeptBefore | None:
        """Return what the longest remembered prompt of `salt` kept that `prompt` extends, `[N]`."""
        if len(self._entries) == 0:
            return None
        digests = block_digests(prompt, BLOCK_TOKENS, salt)
        for blocks in range(len(digests), 0, -1):
            entries = self._entries.get(digests[blocks - 1])
            best = _longest(entries or (), prompt, blocks * BLOCK_TOKENS)
            if best is not None:
                return best
        return None


def _longest(entries: Sequence[_Entry], prompt: Sequence[int], start: int) -> KeptBefore | None:
    """Return what the entry kept that agrees longest with `prompt` from `start` on."""
    found: KeptBefore | None = None
    for entry in entries:
        equal = _equal_tokens(entry.tail, prompt[start : start + len(entry.tail)])
        tokens = start + equal
        if len(entry.tail) - equal > entry.opening_tokens or tokens >= len(prompt):
            continue
        if found is None or tokens > found.tokens:
            found = KeptBefore(tokens, _clipped(entry.runs, tokens), entry.keep)
    return found


def _equal_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the equal first tokens."""
    pairs = zip(one, other, strict=False)
    differing = (place for place, (left, right) in enumerate(pairs) if left != right)
    return next(differing, min(len(one), len(other)))


def _clipped(runs: Sequence[Span], tokens: int) -> tuple[Span, ...]:
    """Return the part of each run below `tokens`."""
    return tuple(Span(run.start, min(run.stop, tokens)) for run in runs if run.start < tokens)
