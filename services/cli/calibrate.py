"""The `specprefill calibrate` command: finds the draft model's heads that retrieve."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ..core.errors import SpecPrefillError
from ..deployment.checked_yaml import InvalidFile, read_text
from ..deployment.file import load
from ..deployment.yaml_edit import CannotEdit, with_values
from ..lab.families.catalog import FAMILIES
from ..quickstart.local_machine import usable_cores
from .exit_codes import OK, Failed, Misused
from .progress_bar import ProgressBar

if TYPE_CHECKING:
    from ..config import AppConfig
    from ..lab.calibration.candidates import AutomaticRate
    from ..lab.calibration.draft_calibration import CalibrationResult

OUT = Path("out") / "calibrate.json"
LENGTHS, ITEMS = (2048,), 6
# One of two families that differ only in what the engine's cache holds is enough.
LEFT_OUT = ("system_secret_warm",)


def add_commands(commands: Any) -> None:
    """Register this module's command with the parser."""
    command = commands.add_parser(
        "calibrate",
        help="find the draft model's heads that retrieve, and the settings that go with them",
        description="Read generated prompts whose answers are known with the draft model of a "
        "deployment file. Half of them show which attention heads look at the answer; the other "
        "half compare scoring by these heads with the paper's scorer, and choose the settings of "
        "the automatic keep rate. Loads the draft model only.",
    )
    command.add_argument("file", type=Path, help="the deployment file")
    command.add_argument(
        "--write", action="store_true", help="set what was found in the deployment file"
    )
    command.add_argument(
        "--families", nargs="+", choices=FAMILIES, metavar="FAMILY",
        default=[name for name in FAMILIES if name not in LEFT_OUT], help="default: all",
    )  # fmt: skip
    command.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, metavar="TOKENS")
    command.add_argument(
        "--items", type=int, default=ITEMS, metavar="N",
        help="prompts of each family and length, at least 2 (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--seed", type=int, default=7)
    command.add_argument(
        "--threads", type=int, default=usable_cores(), metavar="N",
        help="threads of the draft model on a CPU (default: %(default)s)",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=OUT, metavar="FILE", help="the figures")
    command.set_defaults(run=run_calibrate)


def run_calibrate(args: argparse.Namespace) -> int:
    """Calibrate, print the table and the keys, write the files."""
    if args.items < 2 or min(args.lengths) < 1 or args.threads < 1:
        raise Misused("specprefill: --items must be at least 2, --lengths and --threads at least 1")
    try:
        config = load(args.file).file.applications[0].args
    except InvalidFile as error:
        raise Misused(str(error)) from error
    if not config.speculator.reads_with_model:
        raise Misused(f"{args.file}: speculator.score_by is words: no draft to calibrate")
    if config.speculator.random_weights:
        raise Misused(
            f"{args.file}: speculator.random_weights is true: random weights retrieve nothing"
        )
    found = _calibrate(args, config)
    print(_report(found))
    _write_figures(found, args, config)
    if args.write:
        _write_into(args.file, found)
    else:
        print(f"\nSet these keys, or let --write set them in {args.file}:\n\n{_fragment(found)}")
    return OK


def _calibrate(args: argparse.Namespace, config: AppConfig) -> CalibrationResult:
    from transformers import AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    from ..config import local_path
    from ..lab.calibration.draft_calibration import CalibrationPlan, calibrate, recording_scorer
    from ..speculator.scorer import load_scorer

    disable_progress_bar()
    paper = {"score_heads": None, "score_reduction": "maximum", "score_queries": "look_ahead"}
    speculator = config.speculator.model_copy(update={**paper, "threads": args.threads})
    plan = CalibrationPlan(tuple(args.families), tuple(args.lengths), args.items, args.seed)
    bar = ProgressBar(plan.prompts, time.monotonic)
    try:
        tokenizer = AutoTokenizer.from_pretrained(local_path(speculator.path))
        if not tokenizer.chat_template:  # a draft without one is asked in the main model's words
            tokenizer.chat_template = AutoTokenizer.from_pretrained(
                local_path(config.model.path)
            ).chat_template
        scorer = recording_scorer(load_scorer(speculator, config.selection.pool_tokens))
        return calibrate(scorer, tokenizer, config.selection, plan, bar.draw)
    except (SpecPrefillError, OSError, ValueError) as error:
        raise Failed(str(error)) from error
    finally:
        print(file=sys.stderr)


def _report(found: CalibrationResult) -> str:
    """Return the tables."""
    from ..lab.calibration.candidates import KEEPS
    from ..lab.reporting.tables import markdown

    paper = found.survivals[0]
    rows = [
        (
            ("* " if each is found.chosen else "") + each.candidate.name,
            *(f"{each.at(place):.1%}" for place in range(len(KEEPS))),
            f"{each.mean:.1%}",
            f"{max(0.0, each.worst_loss(paper)):.0%}",
        )
        for each in found.survivals
    ]
    headers = ("scored by", *(f"keep {keep:g}" for keep in KEEPS), "mean", "most lost")
    lines = [
        "Share of the gold that is kept whole, mean over the families; 'most lost' is the family "
        "that loses most beside the paper's scorer; * is chosen.",
        "",
        markdown(headers, rows),
        "",
        f"Seconds to score 1,000 tokens: {1e3 * found.paper_token_s:.3f} by the paper's scorer, "
        f"{1e3 * found.chosen_token_s:.3f} by the chosen one.",
        f"The automatic rate by the paper's scores: {_describe(found.paper_automatic)}.",
        f"The automatic rate by the chosen scores: {_describe(found.automatic)}.",
    ]
    lines += [f"{family} does not fit into {length} tokens." for family, length in found.too_short]
    return "\n".join(lines)


def _describe(rate: AutomaticRate) -> str:
    return (
        f"prunes {rate.pruned} of {rate.can_be_pruned} prompts that can be pruned and keeps "
        f"{rate.survival:.1%} of their gold, sends {rate.sent_dense} of {rate.others} others "
        f"dense, keeps {rate.kept:.1%} of all tokens (least_certainty {rate.least_certainty:g}, "
        f"peak_share {rate.peak_share:g})"
    )


def _fragment(found: CalibrationResult) -> str:
    """Return the keys as they stand in a deployment file."""
    values = {"speculator": found.speculator_values(), "selection": found.selection_values()}
    text: str = yaml.safe_dump(values, sort_keys=False, default_flow_style=None)
    return text


def _write_into(file: Path, found: CalibrationResult) -> None:
    """Set the keys in the deployment file. Raises Failed where its form does not allow it."""
    args = ("applications", 0, "args")
    try:
        text = read_text(file)
        text = with_values(text, (*args, "speculator"), found.speculator_values())
        text = with_values(text, (*args, "selection"), found.selection_values())
    except (CannotEdit, InvalidFile) as error:
        raise Failed(f"{file}: {error}; set these keys by hand:\n{_fragment(found)}") from error
    file.write_text(text, encoding="utf-8")
    print(f"\nwritten into {file}")


def _write_figures(found: CalibrationResult, args: argparse.Namespace, config: AppConfig) -> None:
    from dataclasses import asdict

    from ..lab.reporting.tables import provenance, write_json

    results = {
        "draft": config.speculator.path,
        "families": list(args.families),
        "lengths": list(args.lengths),
        "items": args.items,
        "chosen": found.chosen.candidate.name,
        "survival": {each.candidate.name: dict(each.families) for each in found.survivals},
        "automatic": asdict(found.automatic),
        "paper_automatic": asdict(found.paper_automatic),
        "paper_token_s": found.paper_token_s,
        "chosen_token_s": found.chosen_token_s,
        "speculator": found.speculator_values(),
        "selection": found.selection_values(),
    }
    write_json(args.out, provenance(args.seed), results)
