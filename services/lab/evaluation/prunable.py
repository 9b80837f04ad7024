"""The automatic rate over the prompts that can be pruned: how many it prunes, and what it loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .arms import DENSE, Arm, Chooser
from .intervals import Interval, retained_interval
from .outcomes import ArmOutcome
from .suite import Suite, SuiteResult

MOST_KEPT = 0.5  # the highest fixed rate at which keeping the answer counts as pruning


@dataclass(frozen=True, slots=True)
class Prunable:
    """The prompts of one family and length, or of several.

    A prompt can be pruned if some fixed rate up to `MOST_KEPT`, by the same scores, keeps what the
    dense prompt answers; of a prompt that is not answered, all of its gold.
    """

    family: str
    prompts: int
    can_be_pruned: int
    pruned: int  # of these, by the automatic rate
    lost: int  # of these, the answers (or gold) that the automatic rate loses
    kept: float  # mean share of their tokens that the automatic rate keeps; NaN without any
    retained: Interval | None  # of the dense score, over all answered prompts


def prunable(measured: SuiteResult, suite: Suite, length: int) -> list[Prunable]:
    """Return one entry per family at one length, then one over all of them.

    Empty where the automatic rate was not measured, or no fixed rate. Where gold is unknown, only
    prompts that were answered count.
    """
    prompts: dict[tuple[str, int], dict[Arm, ArmOutcome]] = {}
    for one in measured.outcomes:
        if one.length == length:
            prompts.setdefault((one.family, one.seed), {})[one.arm] = one
    usable = [
        arms
        for arms in prompts.values()
        if _automatic(arms) and _fixed(arms) and (suite.gold_known or _is_answered(arms))
    ]
    families = dict.fromkeys(arms[DENSE].family for arms in usable)
    found = [
        _summarise(family, [arms for arms in usable if arms[DENSE].family == family], suite.seed)
        for family in families
    ]
    return [*found, _summarise("all", usable, suite.seed)] if found else []


def _summarise(family: str, prompts: Sequence[Mapping[Arm, ArmOutcome]], seed: int) -> Prunable:
    some = [arms for arms in prompts if any(_keeps(one, arms[DENSE]) for one in _fixed(arms))]
    chosen = [(one, arms[DENSE]) for arms in some for one in _automatic(arms)]
    answered = [
        (one, arms[DENSE])
        for arms in prompts
        for one in _automatic(arms)
        if one.score is not None and arms[DENSE].score is not None
    ]
    shares = [one.answer.kept_tokens / one.answer.prompt_tokens for one, _ in chosen]
    return Prunable(
        family=family,
        prompts=len(prompts),
        can_be_pruned=len(chosen),
        pruned=sum(share < 1.0 for share in shares),
        lost=sum(not _keeps(one, dense) for one, dense in chosen),
        kept=sum(shares) / len(shares) if shares else float("nan"),
        retained=retained_interval(
            [one.score or 0.0 for one, _ in answered],
            [dense.score or 0.0 for _, dense in answered],
            [one.seed for one, _ in answered],
            seed,
        ),
    )


def _keeps(one: ArmOutcome, dense: ArmOutcome) -> bool:
    """Return True if an arm keeps what the dense prompt answers, or without answers all gold."""
    if one.score is None or dense.score is None:
        return one.answer.gold_kept == 1.0
    return one.score >= dense.score > 0.0


def _is_answered(arms: Mapping[Arm, ArmOutcome]) -> bool:
    return all(one.score is not None for one in arms.values())


def _automatic(arms: Mapping[Arm, ArmOutcome]) -> list[ArmOutcome]:
    return [one for arm, one in arms.items() if arm.chooser is Chooser.AUTOMATIC]


def _fixed(arms: Mapping[Arm, ArmOutcome]) -> list[ArmOutcome]:
    return [
        one
        for arm, one in arms.items()
        if arm.chooser is Chooser.SPECULATOR and arm.keep <= MOST_KEPT
    ]
