"""The suite's figures as Markdown, JSON and one HTML page with plots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..families.judging import Verdict
from ..reporting.charts import table, write_page
from ..reporting.tables import Provenance, write_json
from .arms import AUTOMATIC, CONTROLS, Arm, Chooser
from .outcomes import Cell
from .prunable import prunable
from .report_plots import plots
from .report_tables import Table, choice_table, gold_and_answers, percent, prunable_table, share
from .suite import Suite, SuiteResult
from .summary import ENOUGH, Row, choices, choices_of_all, pool_cells, rows_of

TITLE = "Quality by keep rate"
NAME = "eval"
_BY_PAPER = {
    Chooser.PAPER: Chooser.SPECULATOR,
    Chooser.PAPER_AUTOMATIC: Chooser.AUTOMATIC,
}


@dataclass(frozen=True, slots=True)
class EvaluationReport:
    """Everything that is printed and written."""

    suite: Suite
    measured: SuiteResult
    rows: tuple[Row, ...]
    subject: Mapping[str, str]  # what was measured: models, endpoint, selection

    def tables(self) -> list[Table]:
        """Return the tables that have rows."""
        made = [
            table
            for length in self.suite.lengths
            for table in (
                self._retained_table(length),
                self._paper_table(length),
                self._text_table(length),
                self._controls_table(length),
                self._gold_table(length),
                self._automatic_table(length),
                self._prunable_table(length),
                self._choice_by_answers(length),
                self._choice_of_all(length),
            )
        ]
        return [table for table in [*made, self._kept_table(), self._verdict_table()] if table.rows]

    def notes(self) -> list[str]:
        """Return what is missing from the tables, and why."""
        left = "gold survival" if self.suite.gold_known else "kept shares"
        lines = [
            f"{family} at {length} tokens is beyond the model (dense score below "
            f"{self.suite.least_dense:g}): {left} only."
            for family, length in self.measured.beyond_model
        ]
        lines += [
            f"{family} does not fit into {length} tokens."
            for family, length in self.measured.too_short
        ]
        return lines

    def _retained_table(self, length: int) -> Table:
        arms = self._places(lambda arm: arm.chooser in (Chooser.SPECULATOR, Chooser.AUTOMATIC))
        rates = [place for place in arms if not self.suite.arms[place].is_dense]
        return Table(
            heading=f"Answers retained at {length} tokens",
            about="Score as a share of the dense score of the same prompts, with the "
            "95 % interval.",
            headers=("family", "prompts", "dense score", *self._names(rates)),
            rows=tuple(
                (
                    row.family,
                    str(row.cells[0].prompts),
                    share(row.cells[0].score),
                    *(share(row.cells[place].retained) for place in rates),
                )
                for row in self._rows_at(length)
                if row.answered
            ),
        )

    def _paper_table(self, length: int) -> Table:
        """Compare the deployment's scores with the paper's, at the same budget."""
        pairs = [
            (ours, place)
            for place in self._places(lambda arm: arm.chooser in _BY_PAPER)
            for ours in self._places(lambda arm: arm.chooser in _BY_PAPER.values())
            if self._is_counterpart(ours, place)
        ]
        compared = [place for pair in pairs for place in pair]
        return Table(
            heading=f"Beside the paper's scorer at {length} tokens",
            about="The same draft model, by the deployment's scores and by the paper's: gold that "
            "survives; in parentheses the answers retained, where the model answers the family.",
            headers=("family", *self._names(compared)),
            rows=tuple(
                (row.family, *(gold_and_answers(row, row.cells[place]) for place in compared))
                for row in self._rows_at(length)
                if compared
            ),
        )

    def _is_counterpart(self, ours: int, papers: int) -> bool:
        """Return True if two arms differ in the scorer alone."""
        mine, other = self.suite.arms[ours], self.suite.arms[papers]
        return _BY_PAPER[other.chooser] is mine.chooser and mine.keep == other.keep

    def _text_table(self, length: int) -> Table:
        """Compare text mode with original positions, at the same kept tokens."""
        as_text = self._places(lambda arm: arm.chooser is Chooser.TEXT)
        pairs = [
            (ours, place)
            for place in as_text
            for ours in self._places(lambda arm: arm.chooser is Chooser.SPECULATOR)
            if self.suite.arms[ours].keep == self.suite.arms[place].keep
        ]
        compared = [place for pair in pairs for place in pair]
        rows = [row for row in self._rows_at(length) if row.answered and compared]
        return Table(
            heading=f"Text mode beside original positions at {length} tokens",
            about="Answers retained from the same kept tokens, at their original positions (keep) "
            "and as text at consecutive positions (text). Below: the kept tokens, and the tokens "
            "that the main model reads, marks included.",
            headers=("family", *self._names(compared)),
            rows=(
                *(
                    (row.family, *(share(row.cells[place].retained) for place in compared))
                    for row in rows
                ),
                *self._token_rows(rows, compared),
            ),
        )

    def _token_rows(self, rows: Sequence[Row], places: Sequence[int]) -> list[tuple[str, ...]]:
        """Return the means over `rows` of kept tokens and of those that the main model reads."""
        if not rows:
            return []

        def mean(place: int, tokens: Callable[[Cell], float]) -> str:
            return f"{sum(tokens(row.cells[place]) for row in rows) / len(rows):.0f}"

        return [
            ("kept tokens", *(mean(place, lambda cell: cell.kept_tokens) for place in places)),
            ("tokens read", *(mean(place, lambda cell: cell.read_tokens) for place in places)),
        ]

    def _controls_table(self, length: int) -> Table:
        compared = self.compared_places()
        return Table(
            heading=f"Beside controls and the ceiling at {length} tokens",
            about="Answers retained by the speculator's choice, by choices that know nothing at "
            "the same budget with the same protected tokens, by the main model's own scores, and "
            "by those of the right answer's tokens in it (the oracle).",
            headers=("family", *self._names(compared)),
            rows=tuple(
                (row.family, *(share(row.cells[place].retained) for place in compared))
                for row in self._rows_at(length)
                if row.answered and len(compared) > 1
            ),
        )

    def _gold_table(self, length: int) -> Table:
        places = self._places(lambda arm: not arm.is_dense and arm.chooser is not Chooser.TEXT)
        return Table(
            heading=f"Gold survival at {length} tokens",
            about="Share of the spans that the answer needs which were kept whole; without "
            "the main model.",
            headers=("family", *self._names(places)),
            rows=tuple(
                (row.family, *(percent(row.cells[place].gold_kept) for place in places))
                for row in self._rows_at(length)
                if row.cells[0].gold_kept is not None
            ),
        )

    def _automatic_table(self, length: int) -> Table:
        places = self._places(lambda arm: arm.chooser in AUTOMATIC)
        found = [
            (row, self.suite.arms[place], row.cells[place])
            for row in self._rows_at(length)
            for place in places
        ]
        return Table(
            heading=f"The automatic keep rate at {length} tokens",
            about="How much the scores asked for, and why (`auto`: as many chunks as they chose; "
            "any other reason sent the prompt dense).",
            headers=("family", "arm", "mean kept", "gold survival", "retained", "reasons"),
            rows=tuple(
                (
                    row.family,
                    arm.name,
                    f"{cell.kept:.0%}",
                    percent(cell.gold_kept),
                    share(cell.retained) if row.answered else "-",
                    ", ".join(f"{name} {count}" for name, count in cell.reasons.items()),
                )
                for row, arm, cell in found
            ),
        )

    def _prunable_table(self, length: int) -> Table:
        return prunable_table(length, prunable(self.measured, self.suite, length))

    def _choice_by_answers(self, length: int) -> Table:
        return choice_table(
            f"Smallest rate that is enough at {length} tokens",
            f"Enough: every answered family retains {ENOUGH:.0%}.",
            choices(self.rows, self.suite, length),
        )

    def _choice_of_all(self, length: int) -> Table:
        return choice_table(
            f"Smallest rate that is enough for all families at {length} tokens",
            f"Enough: every answered family retains {ENOUGH:.0%}, and of every other one as much "
            "of its gold survives; where nothing is gold, the answer needs all of the prompt.",
            choices_of_all(self.rows, self.suite, length),
        )

    def _kept_table(self) -> Table:
        """Return the kept shares: floors and protected tokens raise a rate above its name."""
        by_length = [
            pool_cells([one for one in self.measured.outcomes if one.length == length], self.suite)
            for length in self.suite.lengths
        ]
        return Table(
            heading="What was kept",
            about="Mean share of the prompt, with protected tokens and the absolute floor.",
            headers=("arm", *(f"{length} tokens" for length in self.suite.lengths)),
            rows=tuple(
                (arm.name, *(f"{cells[place].kept:.1%}" for cells in by_length))
                for place, arm in enumerate(self.suite.arms)
            ),
        )

    def _verdict_table(self) -> Table:
        beyond = set(self.measured.beyond_model)
        asked = [one for one in self.measured.outcomes if (one.family, one.length) not in beyond]
        cells = pool_cells(asked, self.suite) if asked else []
        answered = [each for each in cells if each.score is not None]
        return Table(
            heading="Kinds of answers",
            about="A miss has nothing of the kind that was asked for; a degenerate answer "
            "repeats itself, the sign of broken positions. Families beyond the model are left out.",
            headers=("arm", *(kind.value.replace("_", " ") for kind in Verdict)),
            rows=tuple(
                (each.arm.name, *(str(each.verdicts[kind.value]) for kind in Verdict))
                for each in answered
            ),
        )

    def _rows_at(self, length: int) -> list[Row]:
        return [row for row in self.rows if row.length == length]

    def _places(self, wanted: Callable[[Arm], bool]) -> list[int]:
        return [place for place, arm in enumerate(self.suite.arms) if wanted(arm)]

    def _names(self, places: Sequence[int]) -> list[str]:
        return [self.suite.arms[place].name for place in places]

    def compared_places(self) -> list[int]:
        """Return the controls and the ceilings, after the speculator at their rate."""
        knowing = (*CONTROLS, Chooser.MAIN_MODEL, Chooser.ORACLE)
        others = self._places(lambda arm: arm.chooser in knowing)
        keeps = {self.suite.arms[place].keep for place in others}
        ours = self._places(lambda arm: arm.chooser is Chooser.SPECULATOR and arm.keep in keeps)
        return [*ours, *others]


def report_of(measured: SuiteResult, suite: Suite, subject: Mapping[str, str]) -> EvaluationReport:
    """Summarise what was measured."""
    return EvaluationReport(suite, measured, tuple(rows_of(measured, suite)), subject)


def text(report: EvaluationReport) -> str:
    """Return all tables and notes in Markdown."""
    notes = "".join(f"- {line}\n" for line in report.notes())
    return "\n".join([each.as_markdown() for each in report.tables()] + [notes])


def write(report: EvaluationReport, origin: Provenance, folder: Path) -> tuple[Path, Path]:
    """Write `eval.json` and `eval.html`."""
    paths = folder / f"{NAME}.json", folder / f"{NAME}.html"
    write_json(paths[0], origin, as_json(report))
    facts = {"command": origin.command, "finished": origin.finished, **report.subject}
    sections = [("Plots", plots(report.rows, report.suite, report.compared_places()))]
    sections += [
        (each.heading, [f"<p>{each.about}</p>", table(each.headers, each.rows)])
        for each in report.tables()
    ]
    sections.append(("Notes", [f"<p>{line}</p>" for line in report.notes()]))
    write_page(paths[1], TITLE, facts, sections)
    return paths


def write_document(report: EvaluationReport, origin: Provenance, path: Path) -> None:
    """Write the tables as a page of the documentation, with the command that made it."""
    subject = "".join(f"- {name}: {value}\n" for name, value in report.subject.items())
    versions = ", ".join(f"{name} {value}" for name, value in origin.versions.items())
    machine = ", ".join(str(value) for value in origin.hardware.values())
    path.write_text(
        f"# {TITLE}\n\nMade by `{origin.command}`, finished {origin.finished}. "
        f"How it is measured: [evaluation.md](evaluation.md).\n\n{subject}"
        f"- seed: {origin.seed}\n- versions: {versions}\n- machine: {machine}\n\n{text(report)}",
        encoding="utf-8",
    )


def as_json(report: EvaluationReport) -> dict[str, Any]:
    """Return cells and every single outcome."""
    return {
        "subject": dict(report.subject),
        "suite": asdict(report.suite),
        "rows": [asdict(row) for row in report.rows],
        "too_short": report.measured.too_short,
        "beyond_model": report.measured.beyond_model,
        "outcomes": [asdict(each) for each in report.measured.outcomes],
    }
