"""Latencies as a client sees them, and what a gateway holds."""

import pytest

from specprefill.core.errors import Overloaded
from specprefill.core.types import Chunk, PlanKind, Reason, Report, Request
from specprefill.gateway.observe.latencies import GAPS_AT_ONCE, ClientLatencies
from specprefill.gateway.observe.load_gauges import LoadGauges
from specprefill.gateway.observe.watched import Ending
from tests.instruments import Instruments

REPORT = Report(PlanKind.PRUNE, Reason.ASKED, 3, 2, 0.66, 0.25, 0.1, 0.2, 0.0, 0.0, 0.5)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


def observed(samples, events, ending):
    """What is observed of one request: events are (time, sample, tokens)."""
    made, clock = Instruments(), Clock()
    one = ClientLatencies("demo", made, clock).on_arrival(Request("r", (1,), b"", samples))
    for clock.now_s, index, tokens in events:
        one.on_chunk(Chunk(index, tuple(range(tokens)), "x"))
    clock.now_s += 1.0
    one.on_end(ending)
    return {
        name: pytest.approx(made.observed(f"vllm_{name}_seconds", "demo"))
        for name in (
            "time_to_first_token", "inter_token_latency", "request_queue_time",
            "e2e_request_latency",
        )
    }  # fmt: skip


def test_a_finished_answer():
    assert observed(1, [(0.5, 0, 1), (0.75, 0, 1), (1.75, 0, 2)], Ending(REPORT)) == {
        "time_to_first_token": [0.5],
        "inter_token_latency": [0.25, 0.5],  # a chunk of two tokens: their mean
        "request_queue_time": [0.25],
        "e2e_request_latency": [2.75],
    }


def test_samples_have_gaps_of_their_own():
    events = [(1.0, 0, 1), (1.5, 1, 1), (2.0, 0, 1), (2.5, 1, 1)]
    found = observed(2, events, Ending(REPORT))
    assert found["time_to_first_token"] == [1.0]
    assert found["inter_token_latency"] == [1.0, 1.0]


def test_gaps_of_a_stream_that_goes_on_are_observed_many_at_once():
    made, clock = Instruments(), Clock()
    one = ClientLatencies("demo", made, clock).on_arrival(Request("r", (1,), b""))
    for clock.now_s in range(GAPS_AT_ONCE):
        one.on_chunk(Chunk(0, (1,), "x"))
    gaps = made.observed("vllm_inter_token_latency_seconds", "demo")
    assert gaps == []
    clock.now_s += 1.0
    one.on_chunk(Chunk(0, (1,), "x"))
    assert made.observed("vllm_inter_token_latency_seconds", "demo") == [1.0] * GAPS_AT_ONCE


def test_a_chunk_without_tokens_is_no_token():
    found = observed(1, [(0.5, 0, 0), (1.0, 0, 1)], Ending(REPORT))
    assert found["time_to_first_token"] == [1.0]
    assert found["inter_token_latency"] == []


def test_what_is_shed_has_no_latency():
    assert set(map(str, observed(1, [], Ending(None, Overloaded("full"))).values())) == {
        str(pytest.approx([]))
    }


class HeldGate:
    waiting, running, is_shared = 3, 2, True


def test_the_load_is_read_anew_each_time():
    made, held = Instruments(), [1]
    gauges = LoadGauges(lambda: held[0], HeldGate(), made)
    gauges.update()
    held[0] = 5
    gauges.update()
    assert made.observed("specprefill_requests_held") == [1, 5]
    assert made.total("specprefill_admission_waiting") == 3
    assert made.total("specprefill_admission_admitted") == 2
    assert made.total("specprefill_admission_shared") == 1


def test_without_admission_control_there_is_no_queue():
    made = Instruments()
    LoadGauges(lambda: 0, None, made).update()
    assert made.made.keys() == {"specprefill_requests_held"}
