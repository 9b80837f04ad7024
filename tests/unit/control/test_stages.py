"""Stage times, learnt online."""

from __future__ import annotations

import random

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.control.stages import (
    DEFAULT_CURVES,
    WINDOW,
    Curve,
    Sample,
    StageCurves,
    StageModel,
    StageModels,
    fit,
)
from specprefill.core.types import PlanKind, Reason, Report

TRUTH = Curve(base_s=0.02, token_s=2e-4, pair_s=3e-9)
LENGTHS = (100, 300, 700, 1500, 3000, 6000, 12000)


def learnt(truth: Curve, prior: Curve = DEFAULT_CURVES.prefill, rounds: int = 5) -> StageModel:
    model = StageModel(prior)
    for _ in range(rounds):
        for tokens in LENGTHS:
            model.observe(tokens, truth.seconds(tokens))
    return model


def report(**changes) -> Report:
    fields = {
        "plan": PlanKind.PRUNE,
        "reason": Reason.DEFAULT,
        "prompt_tokens": 1000,
        "kept_tokens": 300,
        "keep_rate": 0.3,
        "queue_s": 0.0,
        "speculate_s": 0.1,
        "prefill_s": 0.2,
        "transfer_s": 0.03,
        "first_decode_s": 0.04,
        "ttft_s": 0.3,
    }
    return Report(**{**fields, **changes})


def test_without_samples_the_prior_answers():
    model = StageModel(TRUTH)
    assert model.curve == TRUTH
    assert model.seconds(1000) == TRUTH.seconds(1000)


def test_a_curve_is_learnt_from_its_samples():
    model = learnt(TRUTH)
    for tokens in (*LENGTHS, 200, 9000):
        assert model.seconds(tokens) == pytest.approx(TRUTH.seconds(tokens), rel=0.05)


def test_cached_tokens_cost_attention_only():
    model = StageModel(DEFAULT_CURVES.prefill)
    for _ in range(3):
        for tokens in LENGTHS:
            for cached in (0, 2048, 8192):
                model.observe(tokens, TRUTH.seconds(tokens, cached), cached)
    assert model.seconds(500, 4096) == pytest.approx(TRUTH.seconds(500, 4096), rel=0.05)
    assert model.seconds(4596) > 4 * model.seconds(500, 4096)


@pytest.mark.parametrize("factor", [0.1, 1.0, 50.0])
def test_one_length_teaches_the_level_and_the_prior_the_shape(factor: float):
    prior = DEFAULT_CURVES.prefill
    model = StageModel(prior)
    model.observe(2000, factor * prior.seconds(2000))
    for tokens in (100, 500, 8000, 30000):
        assert model.seconds(tokens) == pytest.approx(factor * prior.seconds(tokens), rel=0.02)


def test_a_change_of_speed_is_believed_within_a_window():
    model = learnt(TRUTH)
    for _ in range(WINDOW):
        for tokens in LENGTHS:
            model.observe(tokens, TRUTH.scale(5.0).seconds(tokens))
    assert model.seconds(4000) == pytest.approx(5 * TRUTH.seconds(4000), rel=0.05)


def test_missing_measurements_teach_nothing():
    model = StageModel(TRUTH)
    model.observe(0, 1.0)
    model.observe(100, 0.0)
    model.observe(100, float("nan"))
    model.observe(100, float("inf"))
    assert model.samples_seen == 0
    assert model.curve == TRUTH


curves = st.builds(
    Curve,
    base_s=st.floats(0.0, 0.5),
    token_s=st.floats(1e-6, 1e-2),
    pair_s=st.floats(0.0, 1e-6),
)
samples = st.lists(
    st.tuples(st.integers(1, 200_000), st.floats(1e-6, 1e4), st.integers(0, 200_000)), max_size=40
)


@given(samples, st.integers(0, 200_000), st.integers(0, 200_000), st.integers(0, 50_000))
def test_seconds_never_fall_with_tokens_and_are_never_negative(
    measured: list[tuple[int, float, int]], one: int, other: int, cached: int
):
    model = StageModel(DEFAULT_CURVES.prefill)
    for tokens, seconds, after in measured:
        model.observe(tokens, seconds, after)
    fewer, more = sorted((one, other))
    assert 0.0 <= model.seconds(fewer, cached) <= model.seconds(more, cached)


@given(curves, st.lists(st.floats(-6.0, 6.0), min_size=WINDOW // 2, max_size=WINDOW // 2))
def test_a_minority_of_outliers_does_not_count(truth: Curve, powers: list[float]):
    """Up to a million times too fast or too slow, in every window: 1 % at most, here nothing."""
    clean, dirty = learnt(truth, rounds=WINDOW), learnt(truth, rounds=WINDOW)
    for tokens in LENGTHS:
        for power in powers:
            dirty.observe(tokens, max(1e-6, 10.0**power * truth.seconds(tokens)))
    for tokens in LENGTHS:
        assert dirty.seconds(tokens) == pytest.approx(clean.seconds(tokens), rel=0.01)


def test_noise_averages_out():
    rng = random.Random(1)
    model = StageModel(DEFAULT_CURVES.prefill)
    for _ in range(300):
        tokens = rng.choice(LENGTHS)
        model.observe(tokens, TRUTH.seconds(tokens) * rng.lognormvariate(0.0, 0.2))
    for tokens in LENGTHS:
        assert model.seconds(tokens) == pytest.approx(TRUTH.seconds(tokens), rel=0.25)


def test_a_fit_never_uses_a_negative_part():
    falling = [Sample(1, 1.0), Sample(1000, 0.5), Sample(10_000, 0.1)]
    curve = fit(falling, [1.0] * 3)
    assert min(curve.base_s, curve.token_s, curve.pair_s) >= 0.0
    assert curve.base_s > 0.0


def test_reports_teach_the_stages_that_ran():
    models = StageModels()
    for _ in range(3):
        models.observe(report(cached_tokens=44))
    curves = models.curves()
    assert curves.speculate.seconds(1000) == pytest.approx(0.1, rel=0.05)
    assert curves.prefill.seconds(256, 44) == pytest.approx(0.2, rel=0.05)
    assert curves.transfer.seconds(300) == pytest.approx(0.03, rel=0.05)
    assert curves.first_decode.seconds(300) == pytest.approx(0.04, rel=0.05)


def test_a_dense_request_teaches_nothing_about_the_speculator():
    models = StageModels()
    models.observe(report(speculate_s=0.0, kept_tokens=1000))
    assert models.speculate.samples_seen == 0
    assert models.prefill.samples_seen == 1


def test_a_recomputed_answer_teaches_nothing_about_the_transfer():
    models = StageModels()
    models.observe(report(recomputed=True))
    assert (models.transfer.samples_seen, models.first_decode.samples_seen) == (0, 0)


def test_curves_are_plain_data():
    curves = StageModels().curves()
    assert msgspec.json.decode(msgspec.json.encode(curves), type=StageCurves) == curves


def test_a_measurement_that_was_given_up_raises_what_is_expected_and_never_lowers_it():
    model = StageModel(Curve(token_s=1e-3))
    model.observe_at_least(1000, 0.5)
    assert model.samples_seen == 0
    assert not model.has_given_up
    model.observe_at_least(1000, 10.0)
    assert model.has_given_up
    assert model.seconds(1000) == pytest.approx(10.0, rel=0.05)
    model.forget_given_up()
    assert model.seconds(1000) == pytest.approx(1.0)
    assert not model.has_given_up


def test_forgetting_what_was_given_up_keeps_what_was_measured():
    model = StageModel(Curve(token_s=1e-3))
    model.observe(1000, 2.0)
    model.observe_at_least(1000, 10.0)
    model.forget_given_up()
    assert model.seconds(1000) == pytest.approx(2.0, rel=0.05)
