"""Percentiles of latencies where some never came."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

import numpy as np


def percentiles(
    values: Sequence[float] | np.ndarray, never: int, at: Sequence[float]
) -> list[float]:
    """Return the percentiles `at` of `values`, and of `never` more that are later than any.

    inf where a percentile falls among those; NaN where there are no values at all.
    """
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    last = len(ordered) + never - 1
    if last < 0:
        return [float("nan")] * len(at)
    places = [share / 100.0 * last for share in at]
    return [
        float(np.interp(place, np.arange(len(ordered)), ordered))
        if ceil(place) < len(ordered)
        else float("inf")
        for place in places
    ]
