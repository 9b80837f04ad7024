"""Counters over totals that are kept elsewhere, in a process that may start anew."""

from __future__ import annotations

from typing import Protocol


class CountsUp(Protocol):
    """A metric's counter."""

    def inc(self, value: float) -> None:
        """Add a positive value."""
        ...


class RisingTotal:
    """Lets a counter follow a total. The total begins at 0 again where its owner does."""

    def __init__(self, counter: CountsUp) -> None:
        self._counter = counter
        self._last = 0.0

    def follow(self, total: float) -> None:
        """Add what the total has grown by."""
        grown = total - self._last if total >= self._last else total
        self._last = total
        if grown > 0:
            self._counter.inc(grown)
