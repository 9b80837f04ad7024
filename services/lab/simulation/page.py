"""A simulation's report page: tables and plots in one file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ...control.scaling.values import Pool
from ..reporting import charts
from .scenarios import Entry, SimulationScenario
from .score import HEADERS, attainment_over_time

EVERY_S = 60.0
POINTS = 600  # of a curve


def write(
    path: Path,
    title: str,
    facts: Mapping[str, str],
    runs: Sequence[tuple[SimulationScenario, list[Entry]]],
) -> None:
    """Write one section per trace."""
    sections = [(case.name, _section(case, entries)) for case, entries in runs]
    charts.write_page(path, title, facts, sections)


def _section(case: SimulationScenario, entries: list[Entry]) -> list[str]:
    slo = case.world.slo
    times = case.trace.time_s.tolist()
    attained = [
        charts.Line(each.score.controller, *attainment_over_time(each.outcome, times, slo, EVERY_S))
        for each in entries
    ]
    return [
        charts.table(HEADERS, [each.score.row() for each in entries]),
        charts.line_chart(
            "Requests that met the SLO, by minute", attained,
            x_label="hours", y_label="share", limit=slo.share,
        ),
        *(_moments(f"{pool.value} replicas, with starting ones", entries, pool) for pool in Pool),
        _column("Requests before prefill", entries, "requests"),
        _column("Keep rate of pruned prompts", entries, "keep rate"),
    ]  # fmt: skip


def _moments(title: str, entries: list[Entry], pool: Pool) -> str:
    lines = []
    for entry in entries:
        moments = entry.outcome.moments
        step = max(1, len(moments.time_s) // POINTS)
        hours = (moments.time_s[::step] / 3600).tolist()
        sizes = moments.provisioned[pool][::step].tolist()
        lines.append(charts.Line(entry.score.controller, hours, sizes, steps=True))
    return charts.line_chart(title, lines, x_label="hours", y_label="replicas")


def _column(title: str, entries: list[Entry], label: str) -> str:
    lines = []
    for entry in entries:
        moments = entry.outcome.moments
        values = moments.queued if label == "requests" else moments.keep
        known = np.flatnonzero(~np.isnan(values))
        known = known[:: max(1, len(known) // POINTS)]
        hours = (moments.time_s[known] / 3600).tolist()
        lines.append(charts.Line(entry.score.controller, hours, values[known].tolist()))
    return charts.line_chart(title, lines, x_label="hours", y_label=label)
