"""The `specprefill loadtest` command: loads a running endpoint at a target rate."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..deployment.checked_yaml import InvalidFile, parse_mapping, read_text, validate
from .arguments import positive_number, require_charts
from .exit_codes import Failed, Misused

if TYPE_CHECKING:
    from ..lab.loadtest.runner import RunProgress
    from ..lab.loadtest.scenario import Scenario
    from ..lab.loadtest.session import SearchResult

OUT = Path("out")


def add_commands(commands: Any) -> None:
    """Register this module's command with the parser."""
    load = commands.add_parser(
        "loadtest",
        help="load an endpoint; report latency, goodput and the answers' score",
        description="Send the requests of SCENARIO at their times, without waiting for earlier "
        "ones, or from clients that wait for their answers, to any OpenAI-compatible endpoint or "
        "to this service's gRPC API. Writes JSON, CSV and an HTML page. Exits 1 when the "
        "scenario's gate is not reached.",
    )
    load.add_argument("scenario", type=Path, metavar="SCENARIO", help="e.g. loadtest/smoke.yaml")
    load.add_argument("--address", metavar="URL", help="overrides target.address")
    load.add_argument("--model", metavar="NAME", help="overrides target.model")
    load.add_argument("--qps", type=positive_number, metavar="R", help="overrides arrivals.qps")
    load.add_argument("--clients", type=int, metavar="N", help="overrides arrivals.clients")
    load.add_argument("--requests", type=int, metavar="N", help="overrides length")
    load.add_argument("--processes", type=int, metavar="N", help="overrides processes")
    load.add_argument("--seed", type=int, metavar="N", help="overrides seed")
    load.add_argument(
        "--out", type=Path, default=OUT, metavar="DIR",
        help="folder for the reports (default: %(default)s)",
    )  # fmt: skip
    load.set_defaults(run=run_load)


def run_load(args: argparse.Namespace) -> int:
    """Run the scenario, print its table, write its files, judge it by its gate."""
    require_charts()
    from ..lab.loadtest import results as report
    from ..lab.loadtest.scenario import Sweep
    from ..lab.loadtest.search import highest_rate
    from ..lab.reporting.tables import provenance

    scenario = _scenario(args)
    found = _run_scenario(scenario)
    name = f"loadtest-{args.scenario.stem}"
    origin = provenance(scenario.seed)
    paths = report.write(args.out, name, origin, scenario, found.runs, found.trials)
    if isinstance(scenario.search, Sweep):
        print(report.sweep_table(found.trials, scenario.target.gpus))
    elif found.trials:
        print(report.trial_table(found.trials))
        print(f"\nhighest rate that held: {highest_rate(found.trials) or 'none'}")
    for run in () if found.trials else found.runs:
        print(report.run_table(report.summaries(run, scenario)))
        print(report.remarks(run), end="")
    if scenario.replicates > 1:
        print(f"\n{report.replicate_table(found.runs)}")
    print("\nwritten to " + ", ".join(map(str, paths)))
    judged = () if found.trials else found.runs
    missed = [line for run in judged for line in report.missed_goals(scenario.gate, run.summary)]
    for line in missed:
        print(f"gate: {line}", file=sys.stderr)
    return 1 if missed else 0


def _scenario(args: argparse.Namespace) -> Scenario:
    """Return the scenario with the command line's changes. Raises Misused."""
    from ..lab.loadtest.scenario import Scenario

    origin = str(args.scenario)
    try:
        raw = parse_mapping(read_text(args.scenario), origin, "target")
        return validate(_override(raw, args), origin, Scenario)
    except InvalidFile as error:
        raise Misused(str(error)) from error


def _override(raw: Mapping[str, Any], args: argparse.Namespace) -> dict[str, Any]:
    changes = {
        "target": {"address": args.address, "model": args.model},
        "arrivals": {"qps": args.qps, "clients": args.clients},
    }
    changed = dict(raw)
    for section, values in changes.items():
        given = {key: value for key, value in values.items() if value is not None}
        if given:
            changed[section] = {**(raw.get(section) or {}), **given}
    if args.requests is not None:
        changed["length"] = {"requests": args.requests}
    for name in ("seed", "processes"):
        if getattr(args, name) is not None:
            changed[name] = getattr(args, name)
    return changed


def _run_scenario(scenario: Scenario) -> SearchResult:
    """Make the prompts and run the scenario. Raises Misused or Failed."""
    from ..lab.loadtest import session
    from ..lab.loadtest.processes import ClientLost
    from ..lab.loadtest.prompt_source import UnknownTokenizer

    try:
        return asyncio.run(_run_by_clients(scenario))
    except (InvalidFile, UnknownTokenizer) as error:
        raise Misused(str(error)) from error
    except (session.NotReady, ClientLost) as error:
        raise Failed(str(error)) from error


async def _run_by_clients(scenario: Scenario) -> SearchResult:
    """Run the scenario in this process, or in several."""
    from ..lab.loadtest import session
    from ..lab.loadtest.processes import client_processes
    from ..lab.loadtest.prompt_source import Source

    async with AsyncExitStack() as clients:
        if scenario.processes > 1:
            measure = await clients.enter_async_context(client_processes(scenario, _show_progress))
        else:
            source = Source.load(scenario.tokenizer, scenario.seed)
            measure = session.measure_here(source, _show_progress)
        if scenario.search is not None:
            return await session.find(scenario, measure)
        return session.SearchResult((), await session.repeat(scenario, measure))


def _show_progress(progress: RunProgress) -> None:
    """Rewrite one progress line on a terminal; write nothing to files."""
    if sys.stderr.isatty():
        line = (
            f"\r{progress.sent} of {progress.total} sent, {progress.in_flight} in flight, "
            f"{progress.answered} answered, {progress.other} not "
        )
        print(line, end="", file=sys.stderr, flush=True)
