"""Reduces outcomes to a report's figures: cells, and the automatic rate beside fixed ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .arms import Arm, Chooser
from .outcomes import ArmOutcome, Cell, cell
from .suite import Suite, SuiteResult

ENOUGH = 0.95  # of the dense score, in every family


@dataclass(frozen=True, slots=True)
class Row:
    """One family at one length: a cell per arm, in the suite's order."""

    family: str
    length: int
    cells: tuple[Cell, ...]
    answered: bool  # False: beyond the model, or not asked for answers

    @property
    def has_answers(self) -> bool:
        """Return True if any dense prompt was answered right: then there is something to retain."""
        return self.answered and self.cells[0].retained is not None


@dataclass(frozen=True, slots=True)
class Choice:
    """An arm over several families at one length."""

    arm: Arm
    kept: float  # mean share of the prompt
    kept_tokens: float
    worst_family: str
    worst_retained: float

    @property
    def is_enough(self) -> bool:
        return self.worst_retained >= ENOUGH


def rows_of(measured: SuiteResult, suite: Suite) -> list[Row]:
    """Return rows by length, then family."""
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


def pool_cells(outcomes: Sequence[ArmOutcome], suite: Suite) -> list[Cell]:
    """Return one cell per arm over the given outcomes; prompts of one seed are one cluster."""
    return [cell(outcomes, arm, suite.seed) for arm in suite.arms]


def choices(rows: Sequence[Row], suite: Suite, length: int) -> list[Choice]:
    """Return every keep rate and the automatic one, each by its worst answered family.

    Empty where no family is answered at all.
    """
    return _choose([row for row in rows if row.length == length and row.has_answers], suite)


def choices_of_all(rows: Sequence[Row], suite: Suite, length: int) -> list[Choice]:
    """Return the same over all families: those without answers by their surviving gold.

    Empty where that would add nothing, or gold is unknown.
    """
    found = [row for row in rows if row.length == length]
    if not suite.gold_known or all(row.has_answers for row in found):
        return []
    return _choose(found, suite)


def smallest_enough(found: Sequence[Choice]) -> Choice | None:
    """Return the fixed rate with the fewest tokens that keeps every family's answers."""
    fixed = [each for each in found if each.arm.chooser is Chooser.SPECULATOR and each.is_enough]
    return min(fixed, key=lambda each: each.kept_tokens, default=None)


def _choose(rows: Sequence[Row], suite: Suite) -> list[Choice]:
    chosen = (Chooser.SPECULATOR, Chooser.AUTOMATIC)
    return [
        _choice(arm, [(row, row.cells[place]) for row in rows])
        for place, arm in enumerate(suite.arms)
        if arm.chooser in chosen and rows
    ]


def _choice(arm: Arm, found: Sequence[tuple[Row, Cell]]) -> Choice:
    worst, family = min((_share_left(row, cell), row.family) for row, cell in found)
    return Choice(
        arm=arm,
        kept=sum(cell.kept for _, cell in found) / len(found),
        kept_tokens=sum(cell.kept_tokens for _, cell in found) / len(found),
        worst_family=family,
        worst_retained=worst,
    )


def _share_left(row: Row, cell: Cell) -> float:
    """Return the share of answers, without them of the gold, without gold all of the prompt."""
    if row.has_answers and cell.retained is not None:
        return cell.retained.value
    return cell.kept if cell.gold_kept is None else cell.gold_kept.value
