"""Percentiles of latencies of which some never came, printed and written."""

import json
import math

import numpy as np
import pytest

from specprefill.lab.loadtest import results
from specprefill.lab.loadtest.outcome import RequestEnding
from specprefill.lab.loadtest.statistics import Replicated, RequestSlo, summarise
from specprefill.lab.reporting.percentiles import percentiles
from specprefill.lab.reporting.tables import provenance, write_json

from .test_load_numbers import outcome


def test_without_missing_values_they_are_numpys():
    values = np.random.default_rng(1).lognormal(size=37)
    wanted = np.percentile(values, (50.0, 95.0, 99.0))
    assert percentiles(values, 0, (50.0, 95.0, 99.0)) == pytest.approx(wanted.tolist())


def test_what_never_came_is_later_than_any():
    """Ranks 0 to 9, of which seven have values: the median lies between ranks 4 and 5."""
    assert percentiles([6, 5, 4, 3, 2, 1, 0], 3, (50.0, 66.0, 67.0)) == [4.5, 5.94, math.inf]
    assert percentiles([], 2, (50.0,)) == [math.inf]
    assert all(map(math.isnan, percentiles([], 0, (50.0, 99.0))))


def test_requests_without_a_first_token_are_later_than_any():
    """Nine answered in 0.5 s and one shed one: the 95th percentile falls between both."""
    outcomes = [outcome(index) for index in range(9)]
    outcomes += [outcome(9, ending=RequestEnding.SHED), outcome(10, ending=RequestEnding.CANCELLED)]
    row = summarise("all", outcomes, RequestSlo())
    assert (row.ttft_s.count, row.ttft_s.mean) == (9, 0.5)
    assert (row.ttft_s.p50, row.ttft_s.p95) == (0.5, math.inf)
    table = results.run_table([row])
    assert "| 500 ms   | -   | -   |" in table
    assert "inf" not in table


def test_what_is_not_finite_is_null_in_json(tmp_path):
    path = tmp_path / "out.json"
    rows = [{"p95": math.inf, "shares": (math.nan, 0.5)}]
    write_json(path, provenance(1), {"rows": rows})
    assert json.loads(path.read_text())["rows"] == [{"p95": None, "shares": [None, 0.5]}]


def test_replicates_without_a_number_have_no_interval():
    one = Replicated.from_values([1.0, math.inf])
    assert math.isnan(one.mean)
    assert math.isnan(one.half_width)
