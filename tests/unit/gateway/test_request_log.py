"""The log line of a finished request."""

from __future__ import annotations

from dataclasses import replace

from specprefill.core.errors import Overloaded
from specprefill.core.types import Chunk, PlanKind, Reason, Report, Request
from specprefill.gateway.observe.request_log import RequestLog

REPORT = Report(PlanKind.PRUNE, Reason.ASKED, 3, 2, 0.66, 0.0, 0.1, 0.2, 0.0, 0.0, 0.25)
REQUEST = Request("r1", (1, 2, 3), b"", samples=1)


def test_a_finished_request() -> None:
    log = RequestLog(REQUEST)
    log.add(Chunk(0, (4, 5), "secret text"))
    log.add(Chunk(0, (6,), "", finish_reason="stop", report=REPORT))
    assert log.pairs() == {
        "request_id": "r1", "outcome": "finished", "prompt_tokens": 3, "output_tokens": 3,
        "plan": "prune", "reason": "asked", "mode": "positions",
        "kept_tokens": 2, "prefilled_by": "prefill",
        "ttft_s": 0.25,
    }  # fmt: skip


def test_a_failed_request_names_its_error() -> None:
    log = RequestLog(REQUEST)
    log.record_failure(Overloaded("the pool is full"))
    assert log.pairs() == {
        "request_id": "r1", "outcome": "Overloaded", "prompt_tokens": 3, "output_tokens": 0,
        "error": "the pool is full",
    }  # fmt: skip


def test_the_key_is_shown_by_its_name() -> None:
    log = RequestLog(replace(REQUEST, key="team-a"))
    assert log.pairs()["key"] == "team-a"


def test_an_answer_that_the_client_left_is_closed() -> None:
    log = RequestLog(REQUEST)
    log.add(Chunk(0, (4,), "a"))
    assert log.pairs()["outcome"] == "closed"
