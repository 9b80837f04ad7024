"""A load test on paper: a table, JSON, one CSV line per request, and a page with plots."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from ..reporting.charts import Line, line_chart, table, write_page
from ..reporting.tables import Provenance, markdown, write_json
from .outcome import RequestEnding, RequestOutcome
from .scenario import Goals, Scenario, Sweep
from .search import Trial, highest_rate
from .session import Run
from .statistics import Replicated, Summary, summarise_groups

HEADERS = (
    "requests", "sent", "qps", "goodput", "in SLO", "TTFT p50", "p95", "p99", "TPOT p50",
    "ITL p95", "E2E p95", "prompt", "kept", "keep", "score", "shed", "failed", "lag p99",
)  # fmt: skip
TRIAL_HEADERS = ("qps", "held", "in SLO", "TTFT p95", "E2E p95", "score", "endings")
SWEEP_HEADERS = (
    "clients", "requests/s", "goodput", "tokens/s", "TTFT p50", "TTFT p95", "TPOT p50", "in SLO",
    "score", "endings",
)  # fmt: skip
_REPORTED = ("kept_tokens", "keep_rate", "queue_s", "speculate_s", "prefill_s", "transfer_s")


def summaries(run: Run, scenario: Scenario) -> list[Summary]:
    """Summarise the whole run, then each variant, then each family where there are several."""
    rows = [run.summary]
    for key in (lambda one: one.variant, lambda one: one.family):
        groups = summarise_groups(run.outcomes, key, scenario.slo)
        rows += groups if len(groups) > 1 else []
    return rows


def run_table(rows: Sequence[Summary]) -> str:
    """Return speed, goodput, kept share, and the answers' score, in one row per group."""
    return markdown(HEADERS, [_cells(row) for row in rows])


def replicate_table(runs: Sequence[Run]) -> str:
    """Return the mean of each figure over the replicates, with its 95 % interval."""
    rows = [
        [name, *_replicated_cells([figure(run.summary) for run in runs], show)]
        for name, figure, show in _REPLICATED
    ]
    return markdown(("of a run", "mean", "95 % interval", "lowest", "highest"), rows)


def _replicated_cells(values: Sequence[float], show: Callable[[float], str]) -> list[str]:
    one = Replicated.from_values(values)
    spread = f"+-{show(one.half_width)}" if np.isfinite(one.half_width) else "-"
    return [show(one.mean), spread, show(min(values)), show(max(values))]


def trial_table(trials: Sequence[Trial]) -> str:
    """Return a search's rates."""
    return markdown(TRIAL_HEADERS, [_trial_cells(trial) for trial in trials])


def sweep_table(trials: Sequence[Trial], gpus: int | None) -> str:
    """Return a sweep's numbers of clients; throughput per GPU where their number is known."""
    return markdown(_sweep_headers(gpus), [_sweep_cells(trial, gpus or 1) for trial in trials])


def remarks(run: Run) -> str:
    """Return what the table does not show: errors by reason, plans by reason, faults."""
    parts = [f"error, {count} times: {error}" for error, count in run.summary.errors.items()]
    parts += [f"plan {reason}: {count}" for reason, count in run.summary.reasons.items()]
    parts += [f"killed {kill.pool} {kill.pid} at {kill.at_s:.1f} s" for kill in run.kills]
    return "".join(f"\n{part}" for part in parts) + ("\n" if parts else "")


def missed_goals(gate: Goals, summary: Summary) -> list[str]:
    """Return the parts of the gate that were not reached, one sentence each."""
    shed = summary.endings.get(RequestEnding.SHED, 0) / summary.requests
    reached = (
        ("attainment", gate.attainment, summary.attainment, True),
        ("score", gate.score, summary.score, True),
        ("error_rate", gate.error_rate, summary.error_rate, False),
        ("shed_rate", gate.shed_rate, shed, False),
    )
    return [
        f"{name} is {value:.3f}, must be at {'least' if least else 'most'} {bound:g}"
        for name, bound, value, least in reached
        if bound is not None and not (value >= bound if least else value <= bound)
    ]


def write(
    folder: Path,
    name: str,
    origin: Provenance,
    scenario: Scenario,
    runs: Sequence[Run],
    trials: Sequence[Trial] = (),
) -> list[Path]:
    """Write `NAME.json`, `NAME.csv` and `NAME.html`; the CSV holds every run's requests."""
    paths = [folder / f"{name}.{kind}" for kind in ("json", "csv", "html")]
    results: dict[str, Any] = {
        "scenario": scenario.model_dump(mode="json"),
        "runs": [_run_dict(run, scenario) for run in runs],
    }
    if scenario.search is not None:
        is_sweep = isinstance(scenario.search, Sweep)
        unit = "clients" if is_sweep else "qps"
        results["trials"] = [{unit: trial.load, "held": trial.held} for trial in trials]
        if not is_sweep:
            results["highest_qps"] = highest_rate(trials)
    write_json(paths[0], origin, results)
    _write_csv(paths[1], runs)
    _write_html(paths[2], name, origin, scenario, runs, trials)
    return paths


def _run_dict(run: Run, scenario: Scenario) -> dict[str, Any]:
    return {
        "summaries": [asdict(row) for row in summaries(run, scenario)],
        "kills": [asdict(kill) for kill in run.kills],
    }


def _cells(row: Summary) -> list[str]:
    seconds = (row.ttft_s.p50, row.ttft_s.p95, row.ttft_s.p99)
    return [
        row.name,
        str(row.requests),
        _number(row.offered_qps, 2),
        _number(row.goodput_qps, 2),
        _share(row.attainment),
        *(_ms(value) for value in (*seconds, row.tpot_s.p50, row.itl_s.p95, row.e2e_s.p95)),
        _number(row.prompt_tokens, 0),
        _number(row.kept_tokens, 0),
        _number(row.keep_rate, 2),
        _share(row.score),
        str(row.endings.get(RequestEnding.SHED, 0)),
        str(row.endings.get(RequestEnding.FAILED, 0) + row.endings.get(RequestEnding.TIMED_OUT, 0)),
        _ms(row.lag_s.p99),
    ]


def _trial_cells(trial: Trial) -> list[str]:
    row = trial.summary
    return [
        f"{trial.load:.3g}",
        "yes" if trial.held else "no",
        _share(row.attainment),
        _ms(row.ttft_s.p95),
        _ms(row.e2e_s.p95),
        _share(row.score),
        ", ".join(f"{count} {ending}" for ending, count in row.endings.items()),
    ]


def _sweep_headers(gpus: int | None) -> tuple[str, ...]:
    per = {"goodput": "goodput per GPU", "tokens/s": "tokens/s per GPU"} if gpus else {}
    return tuple(per.get(name, name) for name in SWEEP_HEADERS)


def _sweep_cells(trial: Trial, gpus: int) -> list[str]:
    row = trial.summary
    return [
        f"{trial.load:.0f}",
        _number(row.requests / row.seconds, 2),
        _number(row.goodput_qps / gpus, 2),
        _number(row.output_tokens_per_s / gpus, 1),
        *(_ms(value) for value in (row.ttft_s.p50, row.ttft_s.p95, row.tpot_s.p50)),
        _share(row.attainment),
        _share(row.score),
        ", ".join(f"{count} {ending}" for ending, count in row.endings.items()),
    ]


def _write_csv(path: Path, runs: Sequence[Run]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(
            ["run", "index", "family", "variant", "ending", "scheduled_s", "lag_s", "ttft_s",
             "tpot_s", "e2e_s", "prompt_tokens", "output_tokens", "score", *_REPORTED, "error"]
        )  # fmt: skip
        for number, run in enumerate(runs):
            rows.writerows(_csv_row(number, outcome) for outcome in run.outcomes)


def _csv_row(run: int, one: RequestOutcome) -> list[object]:
    stream = one.stream
    return [
        run, one.index, one.family, one.variant, stream.ending.value, one.scheduled_s, one.lag_s,
        one.ttft_s, one.tpot_s, one.e2e_s, stream.prompt_tokens, stream.output_tokens, one.score,
        *(one.report_number(name) for name in _REPORTED), stream.error,
    ]  # fmt: skip


def _write_html(
    path: Path,
    name: str,
    origin: Provenance,
    scenario: Scenario,
    runs: Sequence[Run],
    trials: Sequence[Trial],
) -> None:
    facts = {
        "command": origin.command,
        "finished": origin.finished,
        "seed": str(origin.seed),
        "target": f"{scenario.target.protocol} {scenario.target.address}, {scenario.target.model}",
        "versions": ", ".join(f"{key} {value}" for key, value in origin.versions.items()),
        "hardware": ", ".join(f"{key}: {value}" for key, value in origin.hardware.items()),
    }
    sections: list[tuple[str, list[str]]] = []
    if trials:
        sections.append(_trial_section(scenario, trials))
    for number, run in enumerate(runs):
        rows = [_cells(row) for row in summaries(run, scenario)]
        unit = "clients" if isinstance(scenario.search, Sweep) else "requests per second"
        title = f"{trials[number].load:.3g} {unit}" if trials else f"Run {number + 1}"
        sections.append((title, [table(HEADERS, rows), *_run_charts(run, scenario)]))
    write_page(path, f"Load test {name}", facts, sections)


def _trial_section(scenario: Scenario, trials: Sequence[Trial]) -> tuple[str, list[str]]:
    if not isinstance(scenario.search, Sweep):
        cells = [_trial_cells(trial) for trial in trials]
        return "Search", [table(TRIAL_HEADERS, cells), _trial_chart(trials)]
    gpus = scenario.target.gpus
    cells = [_sweep_cells(trial, gpus or 1) for trial in trials]
    return "Sweep", [table(_sweep_headers(gpus), cells), _pareto_chart(trials, gpus)]


def _pareto_chart(trials: Sequence[Trial], gpus: int | None) -> str:
    """Draw what throughput costs in latency, a point per number of clients that has a latency."""
    drawn = [trial.summary for trial in trials if np.isfinite(trial.summary.ttft_s.p95)]
    latency = [summary.ttft_s.p95 for summary in drawn]
    good = [summary.goodput_qps / (gpus or 1) for summary in drawn]
    per = "requests/s per GPU" if gpus else "requests/s"
    lines = [Line("goodput", latency, good)]
    return line_chart("Goodput and latency", lines, x_label="TTFT p95, s", y_label=per)


def _trial_chart(trials: Sequence[Trial]) -> str:
    ordered = sorted(trials, key=lambda trial: trial.load)
    rates = [trial.load for trial in ordered]
    lines = [
        Line("in SLO", rates, [trial.summary.attainment for trial in ordered]),
        Line("score", rates, [trial.summary.score for trial in ordered]),
    ]
    return line_chart("Load and what became of it", lines, x_label="requests/s", y_label="share")


def _run_charts(run: Run, scenario: Scenario) -> list[str]:
    variants: dict[str, list[RequestOutcome]] = {}
    asked: Counter[str] = Counter()
    for outcome in run.outcomes:
        if outcome.stream.ending is RequestEnding.CANCELLED:
            continue
        asked[outcome.variant] += 1
        if outcome.ttft_s is not None:
            variants.setdefault(outcome.variant, []).append(outcome)
    over_time = [
        Line(name, [one.scheduled_s for one in group], [one.ttft_s or 0.0 for one in group])
        for name, group in variants.items()
    ]
    spread = [_cumulative(name, group, asked[name]) for name, group in variants.items()]
    return [
        line_chart("TTFT over the run", over_time, x_label="sent at, s", y_label="TTFT, s",
                   limit=scenario.slo.ttft_s),
        line_chart("TTFT distribution", spread, x_label="TTFT, s", y_label="share of requests"),
    ]  # fmt: skip


def _cumulative(name: str, group: Sequence[RequestOutcome], asked: int) -> Line:
    """Return the shares of `asked` requests; those without a first token are not in the group."""
    values = np.sort([one.ttft_s or 0.0 for one in group])
    shares = np.arange(1, len(values) + 1) / asked
    return Line(name, values.tolist(), shares.tolist(), steps=True)


def _number(value: float, digits: int) -> str:
    return f"{value:.{digits}f}" if np.isfinite(value) else "-"


def _share(value: float) -> str:
    return f"{value:.1%}" if np.isfinite(value) else "-"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if np.isfinite(seconds) else "-"


_REPLICATED: tuple[tuple[str, Callable[[Summary], float], Callable[[float], str]], ...] = (
    ("TTFT p50", lambda row: row.ttft_s.p50, _ms),
    ("TTFT p95", lambda row: row.ttft_s.p95, _ms),
    ("TTFT p99", lambda row: row.ttft_s.p99, _ms),
    ("TPOT p50", lambda row: row.tpot_s.p50, _ms),
    ("E2E p95", lambda row: row.e2e_s.p95, _ms),
    ("goodput, requests/s", lambda row: row.goodput_qps, lambda value: _number(value, 2)),
    ("in SLO", lambda row: row.attainment, _share),
    ("score", lambda row: row.score, _share),
)
