"""Means and ratios with intervals: known values, pairing and clusters."""

from __future__ import annotations

import math
import random

import pytest

from specprefill.lab.evaluation.intervals import mean_interval, retained_interval


def test_a_mean_of_equal_values_has_no_width():
    interval = mean_interval([0.5] * 10, list(range(10)), seed=0)
    assert (interval.value, interval.low, interval.high) == (0.5, 0.5, 0.5)


def test_the_interval_of_a_proportion_is_the_binomials():
    values = [1.0] * 80 + [0.0] * 20
    interval = mean_interval(values, list(range(100)), seed=0)
    half_width = 1.96 * math.sqrt(0.8 * 0.2 / 100)
    assert interval.value == pytest.approx(0.8)
    assert interval.low == pytest.approx(0.8 - half_width, abs=0.02)
    assert interval.high == pytest.approx(0.8 + half_width, abs=0.02)


def test_equal_arms_retain_everything_for_certain():
    rng = random.Random(0)
    scores = [float(rng.random() < 0.5) for _ in range(50)]
    interval = retained_interval(scores, scores, list(range(50)), seed=0)
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


def test_pairing_narrows_the_interval():
    dense = [1.0, 0.0] * 50
    worse = [1.0, 0.0] * 45 + [0.0, 0.0] * 5
    paired = retained_interval(worse, dense, list(range(100)), seed=0)
    mismatched = retained_interval(worse, dense[1:] + dense[:1], list(range(100)), seed=0)
    assert paired.value == mismatched.value == pytest.approx(0.9)
    assert paired.high - paired.low < 0.6 * (mismatched.high - mismatched.low)


def test_prompts_of_one_cluster_count_once():
    values = [1.0] * 50 + [0.0] * 50
    apart = mean_interval(values, list(range(100)), seed=0)
    together = mean_interval(values, [place // 10 for place in range(100)], seed=0)
    assert together.high - together.low == pytest.approx(
        (apart.high - apart.low) * math.sqrt(10), rel=0.25
    )


def test_the_retained_share_of_nothing_is_nothing():
    assert retained_interval([0.0, 0.0], [0.0, 0.0], [0, 1], seed=0) is None


def test_no_values_are_refused():
    with pytest.raises(ValueError, match="at least one value"):
        mean_interval([], [], seed=0)


def test_equal_seeds_give_equal_intervals():
    values = [0.0, 1.0, 1.0, 0.5, 0.25]
    first, again = (mean_interval(values, [0, 1, 2, 3, 4], seed=7) for _ in range(2))
    assert first == again
