"""Measures how long requests wait in a replica. Pure."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from heapq import nsmallest


class Waiting:
    """The requests inside one replica, by arrival time."""

    def __init__(self, now: Callable[[], float]) -> None:
        self._now = now
        self._numbers = itertools.count()
        self._since_s: dict[int, float] = {}

    @contextmanager
    def track(self) -> Iterator[None]:
        """Track a request from its arrival until it is answered."""
        number = next(self._numbers)
        self._since_s[number] = self._now()
        try:
            yield
        finally:
            del self._since_s[number]

    def oldest_s(self) -> float:
        """Return the age of the oldest request behind the one being computed; 0 without one."""
        oldest = nsmallest(2, self._since_s.values())
        return self._now() - oldest[1] if len(oldest) == 2 else 0.0
