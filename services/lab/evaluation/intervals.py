"""Means and ratios with bootstrap confidence intervals, resampled by prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
LEVEL = 0.95

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and its bounds at confidence `LEVEL`."""

    value: float
    low: float
    high: float


def mean_interval(values: Sequence[float], clusters: Sequence[int], seed: int) -> Interval:
    """Return the mean; values of one cluster are drawn together. Raises ValueError without any."""
    ones = [1.0] * len(values)
    return _ratio(values, ones, clusters, seed)


def retained_interval(
    scores: Sequence[float], dense: Sequence[float], clusters: Sequence[int], seed: int
) -> Interval | None:
    """Return mean(scores) / mean(dense), both of the same prompts in the same order.

    Paired: a resample draws a cluster's scores of both arms together. None where dense is 0
    throughout: there is nothing to retain.
    """
    if sum(dense) <= 0.0:
        return None
    return _ratio(scores, dense, clusters, seed)


def _ratio(
    above: Sequence[float], below: Sequence[float], clusters: Sequence[int], seed: int
) -> Interval:
    """Return sum(above) / sum(below), with the percentiles of cluster bootstrap resamples."""
    if not above:
        raise ValueError("an interval needs at least one value")
    sums = _cluster_sums(above, below, clusters)
    drawn = np.random.default_rng(seed).multinomial(
        len(sums), np.full(len(sums), 1.0 / len(sums)), size=RESAMPLES
    )
    totals = drawn @ sums
    usable = totals[totals[:, 1] > 0.0]
    tail = 100.0 * (1.0 - LEVEL) / 2.0
    low, high = np.percentile(usable[:, 0] / usable[:, 1], [tail, 100.0 - tail])
    return Interval(float(sum(above) / sum(below)), float(low), float(high))


def _cluster_sums(
    above: Sequence[float], below: Sequence[float], clusters: Sequence[int]
) -> Floats:
    """Return [clusters, 2]: the sums of both."""
    places = {cluster: place for place, cluster in enumerate(dict.fromkeys(clusters))}
    sums = np.zeros((len(places), 2))
    for cluster, top, bottom in zip(clusters, above, below, strict=True):
        sums[places[cluster]] += (top, bottom)
    return sums
