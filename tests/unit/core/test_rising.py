"""Counters that follow totals."""

from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.rising import RisingTotal


class Counted:
    def __init__(self):
        self.value = 0.0

    def inc(self, value):
        assert value > 0  # as Ray demands
        self.value += value


@given(st.lists(st.integers(0, 1000)))
def test_a_counter_never_goes_back_and_misses_nothing(grown):
    counted, total, sum_ = Counted(), 0, 0
    rising = RisingTotal(counted)
    for more in grown:
        total += more
        sum_ += more
        rising.follow(total)
        assert counted.value == sum_


def test_an_owner_that_starts_anew_goes_on_counting():
    counted = Counted()
    rising = RisingTotal(counted)
    for total in (5, 7, 0, 2, 2, 3):
        rising.follow(total)
    assert counted.value == 7 + 3
