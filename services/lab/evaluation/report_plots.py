"""The suite's figures as plots."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..reporting.charts import Line, bar_chart, line_chart
from .arms import Chooser
from .intervals import Interval
from .outcomes import Cell
from .suite import Suite
from .summary import Row


def plots(rows: Sequence[Row], suite: Suite, compared: Sequence[int]) -> list[str]:
    """Plot by length: answers retained and gold survival against the keep rate, and controls.

    `compared` holds the places of the arms that stand beside the controls, and of these.
    """
    made = []
    for length in suite.lengths:
        found = [row for row in rows if row.length == length]
        for title, value in (
            (f"Answers retained, {length} tokens", lambda each: each.retained),
            (f"Gold survival, {length} tokens", lambda each: each.gold_kept),
        ):
            curves = [line for row in found if (line := _curve(row, value)) is not None]
            if curves:
                made.append(
                    line_chart(title, curves, x_label="share of the prompt kept", y_label="share")
                )
        made += _control_bars(found, suite, compared, length)
    return made


def _curve(row: Row, value: Callable[[Cell], Interval | None]) -> Line | None:
    points = sorted(
        (cell.kept, found.value, found.low, found.high)
        for cell in row.cells
        if cell.arm.chooser is Chooser.SPECULATOR and (found := value(cell)) is not None
    )
    if not points:
        return None
    kept, values, low, high = zip(*points, strict=True)
    return Line(row.family, kept, values, low, high)


def _control_bars(
    rows: Sequence[Row], suite: Suite, compared: Sequence[int], length: int
) -> list[str]:
    answered = [row for row in rows if row.answered]
    if not answered or len(compared) < 2:
        return []
    bars = {
        suite.arms[place].name: [
            0.0 if (found := row.cells[place].retained) is None else found.value for row in answered
        ]
        for place in compared
    }
    families = [row.family for row in answered]
    return [bar_chart(f"Controls, {length} tokens", families, bars, y_label="answers retained")]
