"""Scores answers, and classifies wrong ones. Pure."""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from .task import Scoring, Task

RIGHT_FROM = 0.999
COPY_LINES_SHARE = 0.5  # of a copy's score; the rest is the similarity of the whole
REPEATS = 3  # as many times in a row is a loop
MAX_LOOP_WORDS = 8


class Verdict(enum.StrEnum):
    """The kind of an answer."""

    RIGHT = "right"
    PARTLY_RIGHT = "partly_right"
    MISS = "miss"  # has nothing of the kind that was asked for
    FLUENT_WRONG = "fluent_wrong"  # has something of that kind, but another
    DEGENERATE = "degenerate"  # repeats itself: the sign of broken positions or a lost sink


def score(task: Task, answer: str) -> float:
    """Score an answer from 0 to 1."""
    if task.scoring is Scoring.NUMBER:
        numbers = re.findall(r"\d+", answer)
        return float(numbers[-1:] == list(task.references))
    if task.scoring is Scoring.COPY:
        return _copy_score(task.references[0], answer)
    if task.scoring is Scoring.TOOL_CALL:
        return float(_call(answer) == json.loads(task.references[0]))
    text = answer.lower()
    return sum(each.lower() in text for each in task.references) / len(task.references)


def verdict(task: Task, answer: str, points: float) -> Verdict:
    """Classify an answer that got `points` of 1."""
    if points >= RIGHT_FROM:
        return Verdict.RIGHT
    if is_looping(answer):
        return Verdict.DEGENERATE
    if points > 0.0:
        return Verdict.PARTLY_RIGHT
    return Verdict.FLUENT_WRONG if _is_of_the_kind(task, answer) else Verdict.MISS


def is_looping(text: str) -> bool:
    """Return True if the text ends in the same one to eight words, three times in a row."""
    words = text.split()
    for size in range(1, MAX_LOOP_WORDS + 1):
        tail = words[-size * REPEATS :]
        if len(tail) == size * REPEATS and tail == tail[:size] * REPEATS:
            return True
    return False


def _copy_score(reference: str, answer: str) -> float:
    """Score half for lines quoted exactly, half for the similarity of the whole."""
    wanted = reference.split("\n")
    quoted = {line.strip() for line in answer.split("\n")}
    exact = sum(line in quoted for line in wanted) / len(wanted)
    similar = SequenceMatcher(None, reference.split(), answer.split(), autojunk=False).ratio()
    return COPY_LINES_SHARE * exact + (1.0 - COPY_LINES_SHARE) * similar


def _call(answer: str) -> Mapping[str, Any] | None:
    """Return the first JSON object with a name and arguments, or None."""
    for start in (match.start() for match in re.finditer(r"\{", answer)):
        try:
            value, _ = json.JSONDecoder().raw_decode(answer, start)
        except ValueError:
            continue
        if isinstance(value, dict) and {"name", "arguments"} <= value.keys():
            return {"name": value["name"], "arguments": _arguments(value["arguments"])}
    return None


def _arguments(value: object) -> object:
    """Return the arguments, which some servers send as a JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _is_of_the_kind(task: Task, answer: str) -> bool:
    """Return True if the answer holds anything shaped like a reference."""
    if task.scoring is Scoring.TOOL_CALL:
        return _call(answer) is not None
    if task.scoring is Scoring.COPY:
        return bool(answer.strip())
    if task.scoring is Scoring.NUMBER:
        return re.search(r"\d", answer) is not None
    return any(re.search(_shape(each), answer) is not None for each in task.references)


def _shape(reference: str) -> str:
    """Return a pattern: numbers of as many digits, words of any length, hexadecimal groups."""
    if reference.isdigit():
        return rf"(?<!\d)\d{{{len(reference)}}}(?!\d)"
    if re.search(r"\d", reference):
        return "-".join(f"[0-9a-f]{{{len(group)}}}" for group in reference.split("-"))
    if reference.isupper():
        return rf"\b[A-Z]{{{len(reference)}}}\b"
    return "-".join(r"\w+" for _ in reference.split("-"))
