"""Assigns each prefix a home replica, so that gateways agree without communication.

Pure. A gateway knows only what it sent itself. To let the next turn of a conversation find its
KV through another gateway, too, an unknown prefix goes to the replica that all gateways compute
from it by consistent hashing (Karger et al., 1997): when replicas come or go, only the
prefixes at home there move.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Iterable, Sequence
from math import log

import xxhash

_POINTS = 128  # of each replica on the ring: evens their shares out
_GROWTH = 4


class Homes:
    """The homes of prefixes among these replicas."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        points = sorted(
            (xxhash.xxh3_64_intdigest(f"{name}/{number}".encode()), name)
            for name in names
            for number in range(_POINTS)
        )
        self._places = [place for place, _ in points]
        self._names = [name for _, name in points]

    def home_of(self, digests: Sequence[int], session: int | None = None) -> str | None:
        """Return the home of a prefix; None where there is no prefix or no replica.

        With a `session`, a digest of 64 bits, it is that one's home. Otherwise it is the home of
        its first 1, 4, 16, ... blocks: prompts that share a long text share it, and a conversation
        stays at home until it is four times as long. A prefix that all prompts of a service share
        does not bring all of them to one replica once they are longer.
        """
        if not digests or not self._names:
            return None
        if session is not None:
            return self._names[bisect(self._places, session) % len(self._names)]
        depth = _GROWTH ** int(log(len(digests) + 0.5, _GROWTH))
        place = bisect(self._places, digests[depth - 1]) % len(self._names)
        return self._names[place]
