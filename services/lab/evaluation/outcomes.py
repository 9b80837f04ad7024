"""The outcome of one arm on one task, and the summary of many."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ..families.judging import Verdict, score, verdict
from ..families.task import Task
from .arms import DENSE, Arm
from .intervals import Interval, mean_interval, retained_interval


@dataclass(frozen=True, slots=True)
class ArmAnswer:
    """A backend's answer for one arm. None: not asked, or not known."""

    text: str | None
    prompt_tokens: int
    kept_tokens: int
    reason: str | None = None  # why as much was kept
    gold_kept: float | None = None  # share of the gold spans that were kept whole
    cached_tokens: int | None = None
    text_tokens: int | None = None  # in text mode: what the main model read, with its marks


@dataclass(frozen=True, slots=True)
class ArmOutcome:
    """One arm on one task, judged."""

    family: str
    length: int  # nominal prompt tokens
    seed: int
    arm: Arm
    answer: ArmAnswer
    score: float | None  # None: not answered
    verdict: Verdict | None


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm on all tasks of one family and length, or of several."""

    arm: Arm
    prompts: int
    kept: float  # mean of kept / prompt tokens
    kept_tokens: float  # mean
    read_tokens: float  # mean, by the main model: the kept ones, in text mode those of the text
    gold_kept: Interval | None
    score: Interval | None
    retained: Interval | None  # of the dense score
    verdicts: dict[str, int]
    reasons: dict[str, int]  # of what was kept


def judge_answer(task: Task, length: int, seed: int, arm: Arm, answer: ArmAnswer) -> ArmOutcome:
    """Score and classify one answer."""
    if answer.text is None:
        return ArmOutcome(task.family, length, seed, arm, answer, None, None)
    points = score(task, answer.text)
    kind = verdict(task, answer.text, points)
    return ArmOutcome(task.family, length, seed, arm, answer, points, kind)


def cell(outcomes: Sequence[ArmOutcome], arm: Arm, seed: int) -> Cell:
    """Summarise one arm beside the dense one. Prompts of one seed are drawn together.

    Raises ValueError where the arm has no outcome.
    """
    ours = {(each.family, each.length, each.seed): each for each in outcomes if each.arm == arm}
    dense = {(each.family, each.length, each.seed): each for each in outcomes if each.arm == DENSE}
    answered = [key for key in ours if ours[key].score is not None and key in dense]
    clusters = [key[2] for key in answered]
    points = [ours[key].score or 0.0 for key in answered]
    dense_points = [dense[key].score or 0.0 for key in answered]
    return Cell(
        arm=arm,
        prompts=len(ours),
        kept=_mean(
            [*ours.values()], lambda each: each.answer.kept_tokens / each.answer.prompt_tokens
        ),
        kept_tokens=_mean([*ours.values()], lambda each: each.answer.kept_tokens),
        read_tokens=_mean([*ours.values()], lambda each: _read_tokens(each.answer)),
        gold_kept=_gold_kept([*ours.values()], seed),
        score=mean_interval(points, clusters, seed) if points else None,
        retained=retained_interval(points, dense_points, clusters, seed) if points else None,
        verdicts=_verdicts([*ours.values()]),
        reasons=dict(Counter(each.answer.reason or "unknown" for each in ours.values())),
    )


def _read_tokens(answer: ArmAnswer) -> int:
    return answer.kept_tokens if answer.text_tokens is None else answer.text_tokens


def _gold_kept(outcomes: Sequence[ArmOutcome], seed: int) -> Interval | None:
    known = [each for each in outcomes if each.answer.gold_kept is not None]
    if not known:
        return None
    shares = [each.answer.gold_kept or 0.0 for each in known]
    return mean_interval(shares, [each.seed for each in known], seed)


def _verdicts(outcomes: Sequence[ArmOutcome]) -> dict[str, int]:
    found = [each.verdict for each in outcomes if each.verdict is not None]
    return {kind.value: found.count(kind) for kind in Verdict}


def _mean(outcomes: Sequence[ArmOutcome], value: Callable[[ArmOutcome], float]) -> float:
    """Return the mean. Raises ValueError where there are no outcomes."""
    if not outcomes:
        raise ValueError("an arm without outcomes")
    return sum(map(value, outcomes)) / len(outcomes)
