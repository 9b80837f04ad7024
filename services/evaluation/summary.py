"""From outcomes to the figures of a report: cells, and the automatic rate beside fixed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arms import Arm, Chooser
from .outcomes import Cell, Outcome, cell
from .suite import Measured, Suite

ENOUGH = 0.95  # of the dense score, in every family


@dataclass(frozen=True, slots=True)
class Row:
    """One family at one length: a cell per arm, in the suite's order."""

    family: str
    length: int
    cells: tuple[Cell, ...]
    answered: bool  # False: beyond the model, or not asked for answers


@dataclass(frozen=True, slots=True)
class Choice:
    """An arm over all answered families at one length."""

    arm: Arm
    kept: float  # mean share of the prompt
    kept_tokens: float
    worst_family: str
    worst_retained: float

    @property
    def is_enough(self) -> bool:
        return self.worst_retained >= ENOUGH


def rows_of(measured: Measured, suite: Suite) -> list[Row]:
    """By length, then family."""
    rows = []
    for length in suite.lengths:
        for family in suite.families:
            some = [
                each for each in measured.outcomes
                if each.family == family and each.length == length
            ]  # fmt: skip
            if some:
                cells = tuple(cell(some, arm, suite.seed) for arm in suite.arms)
                answered = suite.answered and (family, length) not in measured.beyond_model
                rows.append(Row(family, length, cells, answered))
    return rows


def pooled(outcomes: Sequence[Outcome], suite: Suite) -> list[Cell]:
    """One cell per arm over whatever outcomes are given; prompts of one seed are one cluster."""
    return [cell(outcomes, arm, suite.seed) for arm in suite.arms]


def choices(rows: Sequence[Row], suite: Suite, length: int) -> list[Choice]:
    """Every keep rate and the automatic one, each by its worst family.

    Empty where no family is answered at all.
    """
    answered = [
        row for row in rows
        if row.length == length and row.answered and row.cells[0].retained is not None
    ]  # fmt: skip
    chosen = (Chooser.SPECULATOR, Chooser.AUTOMATIC)
    return [
        _choice(arm, [(row.family, row.cells[place]) for row in answered])
        for place, arm in enumerate(suite.arms)
        if arm.chooser in chosen and answered
    ]


def smallest_enough(found: Sequence[Choice]) -> Choice | None:
    """The fixed rate with the fewest tokens that keeps every family's answers."""
    fixed = [each for each in found if each.arm.chooser is Chooser.SPECULATOR and each.is_enough]
    return min(fixed, key=lambda each: each.kept_tokens, default=None)


def _choice(arm: Arm, cells: Sequence[tuple[str, Cell]]) -> Choice:
    retained = [
        (each.retained.value, family) for family, each in cells if each.retained is not None
    ]
    worst, family = min(retained)
    return Choice(
        arm=arm,
        kept=sum(each.kept for _, each in cells) / len(cells),
        kept_tokens=sum(each.kept_tokens for _, each in cells) / len(cells),
        worst_family=family,
        worst_retained=worst,
    )
