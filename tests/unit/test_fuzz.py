"""The fuzzer itself: the same seed sends the same bytes, and nothing that went wrong is missed."""

from __future__ import annotations

import json
import random

import pytest

from tests.fuzz import grpc_cases, http_cases
from tests.fuzz.attack import Answer, Tally, _http_fault
from tests.fuzz.http_cases import MOST_TOKENS, HttpCase, mutated, request, tamed
from tests.fuzz.watch import TRACEBACK, _tracebacks


def test_a_seed_repeats_every_byte() -> None:
    assert list(http_cases.from_mutation(50, 3)) == list(http_cases.from_mutation(50, 3))
    assert list(http_cases.from_strategies(20, 3)) == list(http_cases.from_strategies(20, 3))
    assert list(grpc_cases.from_mutation(50, 3)) == list(grpc_cases.from_mutation(50, 3))
    assert list(http_cases.from_mutation(50, 3)) != list(http_cases.from_mutation(50, 4))


def test_mutation_changes_something_most_of_the_time() -> None:
    rng = random.Random(0)
    data = b'{"model": "demo", "prompt": "hello"}'
    assert sum(mutated(data, rng) != data for _ in range(200)) > 190


def test_a_request_declares_the_length_of_its_body() -> None:
    head, _, body = request("POST", "/v1/completions", b"12345").partition(b"\r\n\r\n")
    assert b"\r\ncontent-length: 5" in head
    assert body == b"12345"


@pytest.mark.parametrize("limit", [None, 5, 2**31])
def test_answers_stay_short(limit: int | None) -> None:
    body = {"prompt": "x", "max_tokens": limit}
    assert tamed("/v1/completions", body)["max_tokens"] == MOST_TOKENS
    assert tamed("/v1/completions", {"max_tokens": -1})["max_tokens"] == -1
    assert tamed("/tokenize", {"prompt": "x"}) == {"prompt": "x"}


CASE = HttpCase("bytes", "POST /", b"POST / HTTP/1.1\r\n\r\n")
LATE = json.dumps({"error": {"code": "deadline_exceeded"}}).encode()


@pytest.mark.parametrize(
    ("case", "answer", "wrong"),
    [
        (CASE, Answer(200, b""), False),
        (CASE, Answer(429, b""), False),
        (CASE, Answer(500, b""), True),
        (CASE, Answer(503, b""), True),
        (CASE, Answer(504, LATE), True),
        (HttpCase("bytes", "x", b"", timed=True), Answer(504, LATE), False),
        (HttpCase("bytes", "x", b"", timed=True), Answer(504, b""), True),
        (CASE, Answer(0, b""), True),
        (HttpCase("bytes", "x", b"", well_formed=False), Answer(0, b""), False),
    ],
)
def test_what_counts_as_a_fault(case: HttpCase, answer: Answer, wrong: bool) -> None:
    assert (_http_fault(case, answer) is not None) is wrong


def test_a_tally_counts_and_keeps_the_faults() -> None:
    tally = Tally()
    tally.add("200", 0.1, None)
    tally.add("500", 0.3, "why")
    assert (tally.sent, tally.slowest_s, tally.faults) == (2, 0.3, ["why"])


def test_tracebacks_are_found_with_their_error() -> None:
    text = f"INFO fine\n{TRACEBACK}:\n  File x\nValueError: why\nINFO\n"
    (found,) = _tracebacks(text)
    assert "ValueError: why" in found
    assert _tracebacks("INFO fine") == []
