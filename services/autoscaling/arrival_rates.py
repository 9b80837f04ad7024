"""Reconstructs arrival times from counts that are read periodically. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

from ..control.scaling.values import Arrivals, Floats
from .signals import Size

_COLUMNS = 4  # time, prompt tokens, kept tokens, output tokens


class Traffic:
    """Arrivals of the last `window_s` seconds, from the counts of any number of gateways."""

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._counts: dict[str, Counter[Size]] = {}
        self._read_s: float | None = None
        self._since_s = 0.0
        self._rows: list[Floats] = []  # each [n, 4], one per reading with arrivals

    @property
    def since_s(self) -> float:
        """The time from which on every arrival is known."""
        return self._since_s

    def add_counts(self, now_s: float, counts: Mapping[str, Counter[Size]]) -> None:
        """Add every gateway's counts. New arrivals are spread evenly since the last reading.

        Counting starts at the first reading. A gateway that is new later has counted from
        zero meanwhile.
        """
        if self._read_s is None:
            self._since_s = now_s
        else:
            new: Counter[Size] = Counter()
            for gateway, count in counts.items():
                new += count - self._counts.get(gateway, Counter())
            self._add(self._read_s, now_s, new)
        self._counts.update(counts)
        self._read_s = now_s
        self._forget(now_s - self._window_s)

    def arrivals(self) -> Arrivals:
        """Return the arrivals of the window, in order."""
        rows = np.concatenate(self._rows) if self._rows else np.empty((0, _COLUMNS))
        return Arrivals(*rows.T)

    def _add(self, start_s: float, stop_s: float, new: Counter[Size]) -> None:
        total = new.total()
        if total == 0:
            return
        sizes = np.array(
            [(each.prompt_tokens, each.kept_tokens, each.output_tokens) for each in new.elements()],
            dtype=np.float64,
        )
        mixed = sizes[np.argsort(np.arange(total) * _GOLDEN % 1.0)]  # sizes arrive in no order
        times = start_s + (np.arange(total) + 0.5) * (stop_s - start_s) / total
        self._rows.append(np.column_stack((times, mixed)))

    def _forget(self, start_s: float) -> None:
        self._since_s = max(self._since_s, start_s)
        while self._rows and self._rows[0][-1, 0] < start_s:
            self._rows.pop(0)


_GOLDEN = (5**0.5 - 1) / 2  # multiples of it are spread evenly, in an order of no pattern
