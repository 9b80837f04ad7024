"""Reconstructs arrival times from counts that are read periodically. Pure."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..control.scaling.values import Arrivals, Floats
from .signals import Size

FIRST_S = 5.0  # within this time every gateway that runs has reported once
MOST_ROWS = 20_000  # that represent the window's arrivals, however many there are


@dataclass(frozen=True, slots=True)
class _Reading:
    """What arrived between two readings, by size."""

    start_s: float
    stop_s: float
    sizes: Floats  # [sizes, 3]: prompt, kept and output tokens
    counts: Floats  # [sizes]


class Traffic:
    """Arrivals of the last `window_s` seconds, from the counts of any number of gateways.

    Kept are counts by reading and size, so that memory and time do not grow with the arrivals.
    """

    def __init__(self, window_s: float) -> None:
        self._window_s = window_s
        self._counts: dict[str, tuple[float, Counter[Size]]] = {}  # by gateway: read when, what
        self._read_s: float | None = None
        self._first_s = 0.0  # when it was first read
        self._since_s = 0.0
        self._readings: deque[_Reading] = deque()

    @property
    def since_s(self) -> float:
        """The time from which on every arrival is known."""
        return self._since_s

    def add_counts(self, now_s: float, counts: Mapping[str, Counter[Size]]) -> None:
        """Add every gateway's counts. New arrivals are spread evenly since the last reading.

        Counting starts at a gateway's first reading, where that is among the first of all: it may
        have counted for days. One that is new later has counted from zero meanwhile. One that
        reports nothing for a whole window is gone.
        """
        if self._read_s is None:
            self._since_s = self._first_s = now_s
        else:
            new: Counter[Size] = Counter()
            is_early = now_s - self._first_s <= FIRST_S
            for gateway, count in counts.items():
                unknown = count if is_early else Counter[Size]()
                _, known = self._counts.get(gateway, (now_s, unknown))
                new += count - known
            self._add(self._read_s, now_s, new)
        self._counts |= {gateway: (now_s, count) for gateway, count in counts.items()}
        self._read_s = now_s
        self._forget(now_s - self._window_s)

    def arrivals(self) -> Arrivals:
        """Return the arrivals of the window, in order; an even sample of them where they are many.

        Within a reading, sizes are mixed.
        """
        if not self._readings:
            return Arrivals(*np.empty((4, 0)))
        sizes = np.concatenate([reading.sizes for reading in self._readings])
        counts = np.concatenate([reading.counts for reading in self._readings])
        lengths = [len(reading.counts) for reading in self._readings]
        reading = np.repeat(np.arange(len(lengths)), lengths)  # [sizes of all], like counts
        ends = np.cumsum(counts)
        rows = int(min(MOST_ROWS, ends[-1]))
        each = float(ends[-1]) / rows
        chosen = np.searchsorted(ends, (np.arange(rows) + 0.5) * each)
        mixed = chosen[np.lexsort((np.arange(rows) * _GOLDEN % 1.0, reading[chosen]))]
        times = self._times(np.bincount(reading[chosen], minlength=len(lengths)))
        prompt, kept, output = sizes[mixed].T
        return Arrivals(times, prompt, kept, output, each)

    def _times(self, rows: NDArray[np.intp]) -> Floats:
        """Spread the `rows` of each reading evenly over it."""
        starts = np.array([reading.start_s for reading in self._readings])
        spans = np.array([reading.stop_s for reading in self._readings]) - starts
        rank = np.arange(rows.sum()) - np.repeat(np.cumsum(rows) - rows, rows)
        between = np.repeat(spans / np.maximum(rows, 1), rows)
        times: Floats = np.repeat(starts, rows) + (rank + 0.5) * between
        return times

    def _add(self, start_s: float, stop_s: float, new: Counter[Size]) -> None:
        if not new:
            return
        sizes = [(each.prompt_tokens, each.kept_tokens, each.output_tokens) for each in new]
        self._readings.append(
            _Reading(
                start_s,
                stop_s,
                np.array(sizes, dtype=np.float64),
                np.array(list(new.values()), dtype=np.float64),
            )
        )

    def _forget(self, start_s: float) -> None:
        self._since_s = max(self._since_s, start_s)
        self._counts = {name: read for name, read in self._counts.items() if read[0] >= start_s}
        while self._readings and self._readings[0].stop_s <= start_s:
            self._readings.popleft()


_GOLDEN = (5**0.5 - 1) / 2  # multiples of it are spread evenly, in an order of no pattern
