"""The parts of a report: a table, how figures are written in it, and tables of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..reporting.tables import markdown
from .arms import Chooser
from .intervals import Interval
from .outcomes import Cell
from .prunable import MOST_KEPT, Prunable
from .summary import Choice, Row, smallest_enough


@dataclass(frozen=True, slots=True)
class Table:
    """A heading, an explanation, and cells."""

    heading: str
    about: str
    headers: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def as_markdown(self) -> str:
        return f"## {self.heading}\n\n{self.about}\n\n{markdown(self.headers, self.rows)}\n"


def choice_table(heading: str, about: str, found: Sequence[Choice]) -> Table:
    """Return the rates of `found`, and a sentence on the automatic one."""
    return Table(
        heading=heading,
        about=f"{about} {_automatic_note(found, smallest_enough(found))}",
        headers=("rate", "mean kept", "kept tokens", "worst family", "retains", "enough"),
        rows=tuple(
            (
                each.arm.name,
                f"{each.kept:.1%}",
                f"{each.kept_tokens:.0f}",
                each.worst_family,
                f"{each.worst_retained:.0%}",
                "yes" if each.is_enough else "no",
            )
            for each in found
        ),
    )


def _automatic_note(found: Sequence[Choice], least: Choice | None) -> str:
    """Return one sentence about the automatic rate, where it was measured."""
    automatic = next((each for each in found if each.arm.chooser is Chooser.AUTOMATIC), None)
    if automatic is None:
        return ""
    if least is None:
        return "No fixed rate is enough."
    of_least = automatic.kept_tokens / least.kept_tokens
    return f"The automatic rate keeps {of_least:.2f} of the tokens of {least.arm.name}."


def prunable_table(length: int, found: Sequence[Prunable]) -> Table:
    """Return how the automatic rate treats the prompts that can be pruned."""
    return Table(
        heading=f"Prompts that can be pruned at {length} tokens",
        about=f"Those where some fixed rate up to {MOST_KEPT:g} keeps what the dense prompt "
        "answers (all of the gold, where the model does not answer the family). Of these: pruned "
        "by the automatic rate, the mean share that it keeps, and those where it loses the answer "
        "(or gold). Retained: of the dense score, over all answered prompts.",
        headers=("family", "prompts", "can be pruned", "pruned", "kept", "lost", "retained"),
        rows=tuple(
            (
                each.family,
                str(each.prompts),
                str(each.can_be_pruned),
                str(each.pruned),
                f"{each.kept:.0%}" if each.can_be_pruned else "-",
                str(each.lost),
                share(each.retained),
            )
            for each in found
        ),
    )


def share(interval: Interval | None) -> str:
    """Write a value with its interval."""
    if interval is None:
        return "-"
    return f"{interval.value:.0%} [{interval.low:.0%}, {interval.high:.0%}]"


def gold_and_answers(row: Row, cell: Cell) -> str:
    """Write the gold that survives, then the answers retained if the family has any."""
    answers = f" ({percent(cell.retained)})" if row.has_answers else ""
    return f"{percent(cell.gold_kept)}{answers}"


def percent(interval: Interval | None) -> str:
    """Write a value without its interval."""
    return "-" if interval is None else f"{interval.value:.0%}"
