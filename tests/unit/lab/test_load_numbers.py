"""The meaning of a load test's numbers."""

import math

import pytest

from specprefill.lab.loadtest import results as report
from specprefill.lab.loadtest import search
from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome, Stream
from specprefill.lab.loadtest.scenario import Goals, MaxQps, PaperProtocol
from specprefill.lab.loadtest.statistics import (
    Distribution,
    RequestSlo,
    summarise,
    summarise_groups,
)


def outcome(
    index, ttft_s=0.5, *, ending=RequestEnding.ANSWERED, lag_s=0.0, variant="dense", score=1.0
):
    arrivals = (ttft_s, ttft_s + 0.1, ttft_s + 0.3)
    stream = Stream(
        ending,
        "a b c",
        arrivals if ending is RequestEnding.ANSWERED else (),
        end_s=ttft_s + 0.5,
        output_tokens=3,
        prompt_tokens=100,
        report={"kept_tokens": 40, "keep_rate": 0.4, "plan": "prune", "reason": "asked"},
        error="" if ending is RequestEnding.ANSWERED else "429: full",
    )
    scored = score if ending is RequestEnding.ANSWERED else None
    return RequestOutcome(index, "vt", variant, float(index), lag_s, stream, scored)


def test_latency_counts_from_the_scheduled_time():
    late = outcome(0, 0.5, lag_s=2.0)
    assert late.ttft_s == 2.5
    assert late.e2e_s == 3.0
    assert late.tpot_s == pytest.approx(0.15)
    assert late.gaps_s == pytest.approx((0.1, 0.2))
    assert not RequestSlo(ttft_s=1.0).is_within_slo(late)


def test_a_group_is_summed_up():
    slo = RequestSlo(ttft_s=1.0)
    outcomes = [
        outcome(0, 0.5),
        outcome(1, 1.5, score=0.0),
        outcome(2, ending=RequestEnding.SHED),
        outcome(3, ending=RequestEnding.CANCELLED),
        outcome(4, 0.7),
    ]
    row = summarise("all", outcomes, slo)
    assert row.attainment == 2 / 4  # the cancelled one does not count
    assert row.offered_qps == 1.0
    assert row.seconds == pytest.approx(4 + 0.7 + 0.5)
    assert row.goodput_qps == pytest.approx(2 / 5.2)
    assert row.endings == {"answered": 3, "shed": 1, "cancelled": 1}
    assert row.errors == {"429: full": 2}
    assert row.ttft_s.count == 3
    assert row.ttft_s.p50 == pytest.approx(1.1)  # of four: the shed one is later than any
    assert row.score == pytest.approx(2 / 3)
    assert row.keep_rate == pytest.approx(0.4)
    assert row.reasons == {"prune: asked": 5}
    assert row.error_rate == 0.0


def test_groups_keep_their_order():
    rows = summarise_groups(
        [outcome(0, variant="b"), outcome(1, variant="a")], lambda o: o.variant, RequestSlo()
    )
    assert [row.name for row in rows] == ["b", "a"]


def test_a_missing_measurement_is_not_zero():
    assert math.isnan(Distribution.from_values([None]).p99)
    with pytest.raises(ValueError, match="no request"):
        summarise("all", [], RequestSlo())


def test_the_gate_names_what_was_missed():
    row = summarise("all", [outcome(0), outcome(1, ending=RequestEnding.SHED)], RequestSlo())
    gate = Goals(attainment=0.5, score=0.9, error_rate=0.0, shed_rate=0.1)
    assert report.missed_goals(gate, row) == ["shed_rate is 0.500, must be at most 0.1"]
    lines = report.missed_goals(Goals(attainment=0.9), row)
    assert lines == ["attainment is 0.500, must be at least 0.9"]


def trials(steps, sustains):
    """Run a search against a service that sustains rates up to `sustains`."""
    qps = next(steps)
    while True:
        good = [outcome(i, 0.1 if qps <= sustains else 9.0) for i in range(8)]
        ending = RequestEnding.ANSWERED if qps <= sustains else RequestEnding.TIMED_OUT
        bad = [outcome(9 + i, ending=ending) for i in range(5)]
        try:
            qps = steps.send(summarise("all", good + bad, RequestSlo(ttft_s=1.0)))
        except StopIteration as ended:
            return ended.value


def test_bisection_ends_next_to_the_highest_rate_that_holds():
    found = trials(search.max_qps(MaxQps(kind="max_qps", low=1, high=16, tolerance=0.05)), 5.3)
    best = search.highest_rate(found)
    assert best <= 5.3
    assert min(trial.load for trial in found if not trial.held) - best <= 0.05 * 5.7
    assert len(found) < 12


@pytest.mark.parametrize(("sustains", "tried"), [(0.5, [1.0]), (99.0, [1.0, 16.0])])
def test_bisection_does_not_search_where_an_end_decides(sustains, tried):
    found = trials(search.max_qps(MaxQps(kind="max_qps", low=1, high=16)), sustains)
    assert [trial.load for trial in found] == tried


def test_the_papers_protocol_ends_at_the_first_rate_with_too_many_failures():
    asked = PaperProtocol(kind="paper", grid=(1.0, 2.0, 3.0, 4.0), pause_s=0)
    found = trials(search.paper(asked), 2.5)
    assert [(trial.load, trial.held) for trial in found] == [(1.0, True), (2.0, True), (3.0, False)]
    assert search.highest_rate(found) == 2.0
    assert search.highest_rate(trials(search.paper(asked), 0.1)) is None
