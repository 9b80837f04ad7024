"""The replicas' signals survive the way to the controller; counts become arrivals in time."""

import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.autoscaling.arrival_rates import MOST_ROWS, Traffic
from specprefill.autoscaling.signals import (
    Size,
    arrival_signals,
    arrivals_in,
    curve_signals,
    curves_in,
    size,
)
from specprefill.control.stages import DEFAULT_CURVES

SHORT, LONG = size(100, 100, 20), size(8000, 2400, 200)


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 10**5))
def test_sizes_are_rounded_to_half_octaves(prompt, kept, output):
    rounded = size(prompt, kept, output)
    pairs = {
        prompt: rounded.prompt_tokens,
        kept: rounded.kept_tokens,
        output: rounded.output_tokens,
    }
    for exact, near in pairs.items():
        assert 0.8 <= near / exact <= 1.25
    assert size(prompt, prompt, 1).kept_tokens == size(prompt, prompt, 1).prompt_tokens


def test_arrivals_and_curves_come_back():
    counted = Counter({SHORT: 3, LONG: 7})
    signals = {**arrival_signals(counted), **curve_signals(DEFAULT_CURVES), "queue_age_s": 1.0}
    assert arrivals_in(signals) == counted
    assert curves_in(signals) == DEFAULT_CURVES
    with pytest.raises(KeyError):
        curves_in({"curve:prefill:base_s": 1.0})


def test_the_first_reading_is_where_counting_begins():
    traffic = Traffic(60.0)
    traffic.add_counts(100.0, {"a": Counter({SHORT: 50})})
    assert len(traffic.arrivals()) == 0
    assert traffic.since_s == 100.0


def test_new_arrivals_are_spread_since_the_last_reading():
    traffic = Traffic(60.0)
    traffic.add_counts(100.0, {"a": Counter()})
    traffic.add_counts(102.0, {"a": Counter({SHORT: 4})})
    traffic.add_counts(106.0, {"a": Counter({SHORT: 4, LONG: 1}), "b": Counter({SHORT: 1})})
    found = traffic.arrivals()
    assert np.all(np.diff(found.time_s) > 0)
    assert np.sum((found.time_s > 100.0) & (found.time_s < 102.0)) == 4
    assert sorted(found.prompt_tokens[4:]) == [SHORT.prompt_tokens, LONG.prompt_tokens]
    assert found.kept_tokens.max() == LONG.kept_tokens


def test_a_gateway_that_reports_a_little_later_than_the_first_has_counted_for_days():
    traffic = Traffic(60.0)
    traffic.add_counts(100.0, {"a": Counter({SHORT: 90_000})})
    traffic.add_counts(100.5, {"a": Counter({SHORT: 90_001}), "b": Counter({SHORT: 95_000})})
    traffic.add_counts(101.0, {"a": Counter({SHORT: 90_001}), "b": Counter({SHORT: 95_002})})
    assert len(traffic.arrivals()) == 3


def test_a_report_that_is_lost_loses_nothing():
    traffic = Traffic(60.0)
    traffic.add_counts(100.0, {"a": Counter({SHORT: 1})})
    traffic.add_counts(101.0, {})
    traffic.add_counts(102.0, {"a": Counter({SHORT: 6})})
    assert len(traffic.arrivals()) == 5


def test_a_gateway_that_is_gone_is_forgotten():
    traffic = Traffic(60.0)
    for second in range(0, 200, 10):
        gone = {f"gone-{second}": Counter({SHORT: 1})}
        traffic.add_counts(float(second), {"a": Counter({SHORT: second}), **gone})
    assert len(traffic._counts) == 1 + 7
    assert len(traffic.arrivals()) == 60 + 6


def test_a_mix_of_sizes_arrives_mixed():
    traffic = Traffic(60.0)
    traffic.add_counts(0.0, {"a": Counter()})
    traffic.add_counts(1.0, {"a": Counter({SHORT: 50, LONG: 50})})
    first_half = traffic.arrivals().prompt_tokens[:50]
    assert 20 <= np.sum(first_half == LONG.prompt_tokens) <= 30


def test_old_arrivals_are_forgotten():
    traffic = Traffic(10.0)
    traffic.add_counts(0.0, {"a": Counter()})
    for second in range(1, 31):
        traffic.add_counts(float(second), {"a": Counter({SHORT: second})})
    assert traffic.since_s == 20.0
    assert 10 <= len(traffic.arrivals()) <= 11


def test_many_arrivals_cost_no_more_than_few():
    """Ten thousand requests a second, of three sizes, from 20 gateways."""
    traffic, middle = Traffic(600.0), size(2000, 600, 50)
    shares = {SHORT: 250, LONG: 150, middle: 100}
    for reading in range(1201):
        counts = {
            f"gateway-{number}": Counter({each: reading * n // 2 for each, n in shares.items()})
            for number in range(20)
        }
        traffic.add_counts(reading / 2, counts)
    found = traffic.arrivals()
    assert len(found) == MOST_ROWS
    assert len(found) * found.each == pytest.approx(600 * 20 * 500, rel=1e-3)
    assert np.all(np.diff(found.time_s) > 0)
    per_minute = np.histogram(found.time_s, bins=10, range=(0.0, 600.0))[0]
    assert per_minute.max() - per_minute.min() <= 2
    for each, n in shares.items():
        share = np.mean(found.prompt_tokens == each.prompt_tokens)
        assert share == pytest.approx(n / 500, abs=0.001)
    seconds = []
    for _ in range(5):
        start_s = time.thread_time()
        traffic.arrivals()
        seconds.append(time.thread_time() - start_s)
    assert min(seconds) < 0.02


def test_dense_stays_dense():
    assert size(777, 777, 5) == Size(724, 724, 6)
