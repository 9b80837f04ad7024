"""The support of a model: its mode and what is printed about it."""

import pytest

from specprefill.core.model_modes import Mode, Support


def test_an_exact_model_that_hands_over_has_nothing_to_print():
    support = Support(Mode.EXACT)
    assert support.hands_over
    assert support.lines() == ()


def test_a_model_whose_kv_cannot_pass_prints_why():
    support = Support(Mode.TEXT, ("no positions",), ("a state",))
    assert not support.hands_over
    assert support.lines() == ("no positions", "KV is not handed over: a state")


@pytest.mark.parametrize("mode", Mode)
def test_positions_are_kept_by_exact_and_windowed_models_alone(mode):
    assert Support(mode).keeps_positions == (mode in ("exact", "windowed"))
