"""The comparison's arithmetic, and what is said where nothing was measured."""

import pytest

from specprefill.bench import max_qps, versus
from specprefill.loadtest.outcome import Ending, Stream
from specprefill.loadtest.search import Trial
from specprefill.loadtest.session import Searched
from specprefill.loadtest.statistics import Slo, summarise

from .test_load_numbers import outcome


def asked(variant, ttft_s, report=None, ending=Ending.ANSWERED):
    arrivals = (ttft_s, ttft_s + 0.5, ttft_s + 0.51, ttft_s + 0.53)
    stream = Stream(ending, "abcd", arrivals, arrivals[-1], 4, 8192, report, "gone")
    return versus.Asked(8192, variant, stream)


def report(kept, speculate_s, prefill_s):
    return {
        "kept_tokens": int(8192 * kept),
        "keep_rate": kept,
        "speculate_s": speculate_s,
        "prefill_s": prefill_s,
    }


def test_speed_up_ceiling_and_overhead():
    plain = [asked(versus.PLAIN, ttft_s) for ttft_s in (9.0, 10.0, 11.0)]
    dense = [asked(versus.DENSE, 10.5, report(1.0, 0.0, 10.2))]
    pruned = [asked("keep 0.1", 1.25, report(0.1, 0.2, 0.9))] * 2
    rows = versus.rows(plain + dense + pruned, {versus.PLAIN: 1.0, "keep 0.1": 0.9})
    by_name = {row["variant"]: row for row in rows}
    row = by_name["keep 0.1"]
    assert row["speed_up"] == pytest.approx(8.0)
    assert row["ceiling"] == pytest.approx(1 / (0.1 + 0.02))
    assert row["of_ceiling"] == pytest.approx(8.0 * 0.12)
    assert row["overhead"] == pytest.approx(0.015)
    assert row["itl_s"] == pytest.approx(0.015)  # the hand-over's gap is left out
    assert by_name[versus.PLAIN]["speed_up"] == 1.0
    lines = versus.table(rows).splitlines()
    assert "8.00x" in lines[-1]
    assert "90%" in lines[-1]
    assert "6.69x" in lines[-1]


def test_an_answer_that_failed_is_not_a_time():
    with pytest.raises(RuntimeError, match=r"keep 0\.1: failed: gone"):
        _ = asked("keep 0.1", 1.0, ending=Ending.FAILED).ttft_s


def borne(name, *held):
    summary = summarise("all", [outcome(0)], Slo())
    trials = tuple(Trial(qps, is_held, summary) for qps, is_held in held)
    return max_qps.borne(name, Searched(trials, ()))


def test_max_qps_beside_a_server_that_bears_nothing():
    scores = {versus.PLAIN: 1.0, "keep 0.1": 0.98}
    plain = borne(versus.PLAIN, (0.5, True), (1.0, False))
    pruned = borne("keep 0.1", (0.5, True), (4.0, True), (5.0, False))
    assert "8.00x" in max_qps.table(plain, [(0.1, pruned)], scores)
    nothing = borne(versus.PLAIN, (0.5, False))
    table = max_qps.table(nothing, [(0.1, pruned)], scores)
    assert "below the grid" in table
    assert "98%" in table
