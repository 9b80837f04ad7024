"""The histograms of pulls."""

from bisect import bisect_left

import pytest

from specprefill.config import GatewayConfig
from specprefill.decode.pull_metrics import PullMetrics
from specprefill.engine.params import PullOutcome
from tests.instruments import Instruments

HISTOGRAMS = ("specprefill_kv_pull_seconds", "specprefill_kv_pull_exposed_seconds")


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_a_slow_pull_has_a_bucket_of_its_own(name):
    counted = Instruments()
    PullMetrics(counted).record(PullOutcome(pull_s=45.0, exposed_s=45.0, recomputed=False))
    (seconds,) = counted.observed(name)
    bounds = counted.made[name].boundaries
    place = bisect_left(bounds, seconds)
    assert (bounds[place - 1], bounds[place]) == (40, 80)  # every quantile lies between


@pytest.mark.parametrize("name", HISTOGRAMS)
def test_pulls_are_measured_up_to_the_longest_request(name):
    counted = Instruments()
    PullMetrics(counted)
    assert counted.made[name].boundaries[-1] >= GatewayConfig().request_timeout_s
