"""Finds the occurrences of strings in a text, each in time linear in the text. Pure.

Continuing the search at every match costs the text's length times the string's where both repeat
themselves ("aaa..." in "aaaa..."), so every window of the string's length is compared by a
rolling hash: sum of code point times base to the power of its place, modulo 2^64. Two strings of
one hash would protect too much, never too little.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Iterator

import numpy as np
from numpy.typing import NDArray

Ranges = NDArray[np.int64]  # [n, 2]: [start, stop), sorted, disjoint, not adjacent

_WINDOW = 1 << 20  # characters that are hashed at once: bounds the memory, not the result
_BASE = np.uint64(secrets.randbits(63) | 1)


class Cancelled(Exception):
    """The caller no longer wants the result."""


def find_occurrences(
    text: str, pieces: Collection[str], is_cancelled: Callable[[], bool]
) -> Ranges:
    """Return the characters that any occurrence of any piece covers, overlapping ones too.

    Raises Cancelled between two steps, each linear in the text, once `is_cancelled()`.
    """
    edges = np.zeros(len(text) + 1, dtype=np.int64)  # +1 where an occurrence starts, -1 after it
    for piece in dict.fromkeys(pieces):
        for starts in _find_starts(text, piece):
            if is_cancelled():
                raise Cancelled
            edges[starts] += 1
            edges[starts + len(piece)] -= 1
    return runs(np.cumsum(edges[:-1]) > 0)


def runs(mask: NDArray[np.bool_]) -> Ranges:
    """Return the maximal runs of True."""
    return np.flatnonzero(np.diff(mask, prepend=False, append=False)).reshape(-1, 2)


def _find_starts(text: str, piece: str) -> Iterator[NDArray[np.int64]]:
    """Yield the start of each occurrence of `piece`, window by window."""
    first = text.find(piece) if piece else -1
    if first < 0:
        return
    size = max(_WINDOW, len(piece))
    powers = _powers(size + len(piece))
    wanted = _codes(piece)
    wanted_hash = (wanted * powers[: len(wanted)]).sum()
    for start in range(first, len(text) - len(piece) + 1, size):
        codes = _codes(text[start : start + size + len(piece) - 1])
        sums = np.concatenate(([np.uint64(0)], np.cumsum(codes * powers[: len(codes)])))
        windows = sums[len(piece) :] - sums[: -len(piece)]
        yield start + np.flatnonzero(windows == wanted_hash * powers[: len(windows)])


def _powers(count: int) -> NDArray[np.uint64]:
    powers = np.full(count, _BASE, dtype=np.uint64)
    powers[0] = 1
    return np.multiply.accumulate(powers)


def _codes(text: str) -> NDArray[np.uint64]:
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    return points.astype(np.uint64)
