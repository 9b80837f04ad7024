"""How long requests wait in a replica. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import nsmallest


class Waiting:
    """The requests inside one replica, by when they came."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._numbers = itertools.count()
        self._since_s: dict[int, float] = {}

    @contextmanager
    def one(self) -> Iterator[None]:
        """A request, from when it comes until it is answered."""
        number = next(self._numbers)
        self._since_s[number] = self._now()
        try:
            yield
        finally:
            del self._since_s[number]

    def oldest_s(self) -> float:
        """Age of the oldest request behind the one that is being computed; 0 if there is none."""
        oldest = nsmallest(2, self._since_s.values())
        return self._now() - oldest[1] if len(oldest) == 2 else 0.0
