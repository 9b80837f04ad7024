"""Scores by the published rules, and the kinds of wrong answers."""

from __future__ import annotations

import json

import pytest

from specprefill.lab.families.judging import Verdict, is_looping, score, verdict
from specprefill.lab.families.task import Scoring, Task


def task(*references, scoring=Scoring.ALL_REFERENCES):
    return Task("any", (), references, (), 16, scoring, 100)


CALL = json.dumps({"name": "open_box", "arguments": {"number": "12345"}})
LINES = "box = sold ( farm , 101 ) ;\nkey = kept ( barn , 202 ) ;"


@pytest.mark.parametrize(
    ("asked", "answer", "points"),
    [
        (task("1234567"), " 1234567.", 1.0),
        (task("1234567"), " 7654321.", 0.0),
        (task("Blue-Fox"), "it is blue-fox", 1.0),  # RULER compares without case
        (task("AAAAA", "BBBBB", "CCCCC", "DDDDD"), "BBBBB DDDDD DDDDD", 0.5),
        (task("34", scoring=Scoring.NUMBER), "14 + 20 = 34", 1.0),
        (task("34", scoring=Scoring.NUMBER), "34 or 35", 0.0),
        (task("34", scoring=Scoring.NUMBER), "134", 0.0),
        (task(LINES, scoring=Scoring.COPY), LINES, 1.0),
        (task(LINES, scoring=Scoring.COPY), "", 0.0),
        (task(CALL, scoring=Scoring.TOOL_CALL), f"Calls: [{CALL}]", 1.0),
        (task(CALL, scoring=Scoring.TOOL_CALL), CALL.replace("12345", "12346"), 0.0),
        (task(CALL, scoring=Scoring.TOOL_CALL), CALL[:-1], 0.0),
        (
            task(CALL, scoring=Scoring.TOOL_CALL),
            '{"name": "open_box", "arguments": "{\\"number\\": \\"12345\\"}"}',
            1.0,
        ),
    ],
)
def test_points(asked, answer, points):
    assert score(asked, answer) == points


def test_a_copy_with_one_wrong_number_gets_half_the_lines_and_most_of_the_similarity():
    points = score(task(LINES, scoring=Scoring.COPY), LINES.replace("202", "203"))
    assert points == pytest.approx(0.5 * 0.5 + 0.5 * 17 / 18)


@pytest.mark.parametrize(
    ("asked", "answer", "kind"),
    [
        (task("1234567"), "1234567", Verdict.RIGHT),
        (task("AAAAA", "BBBBB"), "AAAAA, CCCCC", Verdict.PARTLY_RIGHT),
        (task("1234567"), "7654321", Verdict.FLUENT_WRONG),
        (task("1234567"), "no such number", Verdict.MISS),
        (task("1234567"), "76543210", Verdict.MISS),  # not of seven digits
        (task("1234567"), "the fox the fox the fox", Verdict.DEGENERATE),
        (task("AAAAA"), "BBBBB", Verdict.FLUENT_WRONG),
        (task("AAAAA"), "bbbbb", Verdict.MISS),
        (task(CALL, scoring=Scoring.TOOL_CALL), "I cannot", Verdict.MISS),
        (
            task("0a0a0a0a-0a0a-4a0a-8a0a-0a0a0a0a0a0a"),
            "11111111-1111-4111-8111-111111111111",
            Verdict.FLUENT_WRONG,
        ),
    ],
)
def test_verdicts(asked, answer, kind):
    assert verdict(asked, answer, score(asked, answer)) is kind


def test_a_loop_is_three_equal_ends():
    assert is_looping("so a b c a b c a b c")
    assert not is_looping("a b c a b c")
    assert not is_looping("a b c a b c a b c d")
