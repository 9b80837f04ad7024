"""The verdicts of `make chaos` and `make soak` on what their runs found."""

from collections import Counter

import pytest

from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome, Stream
from specprefill.lab.loadtest.session import Run
from specprefill.lab.loadtest.statistics import RequestSlo, summarise
from tests.faults import soak
from tests.faults.chaos import Outcome


def chaos(staying=140, **endings):
    return Outcome(staying=staying, endings=Counter(endings)).faults


def test_streams_that_complete_or_are_left_are_no_fault():
    assert chaos(complete=158, left=42) == []


@pytest.mark.parametrize(
    "kind", ["500 internal", "429 without a code", "in the stream: unavailable", "broken"]
)
def test_a_stream_that_ends_in_an_error_is_a_fault(kind):
    assert chaos(complete=157, left=42, **{kind: 1}) == [f"1 streams ended with: {kind}"]


def test_a_few_refusals_with_a_code_are_no_fault():
    assert chaos(complete=154, left=42, **{"429 pool_full": 3, "503 unavailable": 1}) == []


def test_a_run_that_refuses_everyone_is_a_fault():
    assert chaos(left=60, **{"503 unavailable": 140}) == ["140 refused, 140 stayed"]


def test_fewer_complete_streams_than_stayed_are_a_fault():
    assert chaos(complete=100, left=100) == ["100 complete, 140 stayed and were not refused"]


def request(index, ttft_s, retries=0, ending=RequestEnding.ANSWERED):
    report = {"retries": retries, "plan": "prune", "reason": "asked", "prefill_s": 0.5}
    answered = ending is RequestEnding.ANSWERED
    stream = Stream(ending, "a", (ttft_s,), ttft_s + 1.0, report=report if answered else None)
    return RequestOutcome(index, "needles", "default", float(index), 0.0, stream, None)


def test_the_soak_shows_how_long_moved_requests_took():
    outcomes = (
        request(0, 1.0),
        request(1, 61.0, retries=2),
        request(2, 3.0, ending=RequestEnding.CANCELLED),
    )
    run = Run(outcomes, summarise("all", outcomes, RequestSlo()))
    found = soak.Findings(run, soak.Memory(), soak.Upgrade(1.0, None))
    assert (found.overhead_s.count, found.overhead_s.p99) == (1, 0.5)
    assert (found.moved, found.moved_ttft_s.p50) == (1, 61.0)
    assert soak.figures(found, 3)["moved_ttft_s"]["p99"] == 61.0
    assert soak.percentiles(found.moved_ttft_s) == "p50 61000 ms, p95 61000 ms, p99 61000 ms"
