"""The number of chunks that the scores ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from loadtest.bench.keep_rate_rules import RULES, RuleName
from specprefill.core.keep_rate import AutoKeep, chunks_needed

SETTING = {
    RuleName.MASS: 0.5,
    RuleName.EXCESS: 0.7,
    RuleName.KNEE: 1.0,
    RuleName.SUPPORT: 0.5,
    RuleName.PEAKS: 0.1,
    RuleName.BACKGROUND: 3.0,
}


def peaked(high: int, low: int) -> NDArray[np.float64]:
    return np.array([1.0] * high + [0.01] * low)


@pytest.mark.parametrize("rule", list(RuleName))
def test_every_rule_finds_a_few_peaks(rule: RuleName):
    found = RULES[rule](peaked(4, 96), SETTING[rule])
    assert 1 <= found <= 8
    if rule in {RuleName.EXCESS, RuleName.KNEE, RuleName.PEAKS, RuleName.BACKGROUND}:
        assert found in {3, 4, 5}


@pytest.mark.parametrize("rule", [RuleName.MASS, RuleName.SUPPORT, RuleName.PEAKS])
def test_even_scores_need_many_chunks(rule: RuleName):
    assert RULES[rule](np.ones(100), SETTING[rule]) >= 50


def test_mass_is_the_fewest_that_hold_the_share():
    assert RULES[RuleName.MASS](np.array([4.0, 3.0, 2.0, 1.0]), 0.7) == 2
    assert RULES[RuleName.MASS](np.array([4.0, 3.0, 2.0, 1.0]), 0.71) == 3


def test_support_is_the_effective_number():
    assert RULES[RuleName.SUPPORT](np.ones(64), 1.0) in {64, 65}
    assert RULES[RuleName.SUPPORT](np.array([1.0, 0.0, 0.0]), 1.0) == 1


scores = st.lists(st.floats(0.0, 1.0, width=32), min_size=1, max_size=60).map(
    lambda values: np.sort(np.array(values, dtype=np.float64))[::-1]
)


@given(scores, st.sampled_from(list(RuleName)))
def test_at_least_one_chunk_and_at_most_all(descending: NDArray[np.float64], rule: RuleName):
    found = chunks_needed(descending, AutoKeep(0.95, RULES[rule], SETTING[rule]), sure=True)
    assert 1 <= found <= len(descending)


@given(scores, st.sampled_from(list(RuleName)), st.integers(-20, 20))
def test_the_scale_of_the_scores_does_not_matter(
    descending: NDArray[np.float64], rule: RuleName, power: int
):
    auto = AutoKeep(0.95, RULES[rule], SETTING[rule])
    descending = np.where(descending > 1e-3, descending, 0.0)
    for sure in (True, False):
        scaled = chunks_needed(descending * 2.0**power, auto, sure=sure)
        assert scaled == chunks_needed(descending, auto, sure=sure)
