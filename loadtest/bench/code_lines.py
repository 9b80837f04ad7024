"""What is kept of code that a question asks for: `make bench-code`.

Prompts are real source code. One family's answers need a function's signature and its return
statement, which `selection.code_lines` keeps; the other's a comment, for which these lines only
take room. The draft of a deployment file scores each prompt once, and chunks are chosen from the
same scores with and without them. Without the main model.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from specprefill.config import AppConfig, local_path
from specprefill.control.from_config import selection_policy
from specprefill.core.selection import select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason
from specprefill.deployment.file import load
from specprefill.lab.evaluation.gold import survival
from specprefill.lab.evaluation.prompts import Renderer
from specprefill.lab.families.catalog import generate
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.speculator.chunking import Chunker
from specprefill.speculator.scorer import load_scorer
from specprefill.speculator.translation import SamePrompt

OUT = Path("out") / "bench-code.json"
FAMILIES = ("code_return", "code_needle")
KEEPS = (0.5, 0.3, 0.2, 0.1)
WAYS = {"chunks alone": False, "needed lines first": True}


@dataclass(frozen=True, slots=True)
class Kept:
    """What one way keeps of one prompt at one rate."""

    family: str
    way: str
    rate: str
    whole: bool  # whether all that the answer needs was kept
    share: float  # of the prompt's tokens


def measure(config: AppConfig, prompts: int, tokens: int, first_seed: int) -> Iterator[Kept]:
    """Yield what is kept of each prompt."""
    tokenizer = AutoTokenizer.from_pretrained(local_path(config.speculator.path))
    scorer = load_scorer(config.speculator, config.selection.pool_tokens)
    renderer = Renderer(tokenizer, config.selection.tail_tokens)
    chunker = Chunker.of(config.selection.model_copy(update={"code_lines": True}), tokenizer)
    policy = selection_policy(config.selection)
    plans = {f"keep {keep:g}": Plan(PlanKind.PRUNE, Reason.ASKED, keep) for keep in KEEPS}
    within = KeepRange(config.selection.floor, config.selection.ceiling)
    plans["automatic"] = Plan(PlanKind.PRUNE, Reason.AUTO, within=within)
    seeds = range(first_seed, first_seed + prompts)
    for family, seed in itertools.product(FAMILIES, seeds):
        prompt = renderer.prompt(generate(family, seed, tokens, tokenizer))
        echo = scorer.echo_of(SamePrompt(prompt.ids), prompt.asked)
        with scorer.open_readings([prompt.ids], echoes=[echo]) as (reading,):
            scorer.read([reading])
            scorer.look_ahead([reading])
            scores, certainty = scorer.rate(reading), reading.certainty
        chunks = chunker.chunks(prompt.ids)
        for way, with_lines in WAYS.items():
            those = chunks if with_lines else replace(chunks, needed=())
            for rate, plan in plans.items():
                chosen = select(scores, plan, prompt.protected, policy, certainty, those)
                whole = survival(prompt.gold, chosen) == 1.0
                yield Kept(family, way, rate, whole, chosen.keep_rate)


def rows(found: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return by family, way and rate the share of prompts with all they need, and of tokens."""
    groups: dict[tuple[str, str, str], list[Kept]] = {}
    for each in found:
        groups.setdefault((each.family, each.way, each.rate), []).append(each)
    return [
        {
            "family": family,
            "way": way,
            "rate": rate,
            "prompts": len(some),
            "kept_whole": statistics.fmean(each.whole for each in some),
            "kept_tokens": statistics.fmean(each.share for each in some),
        }
        for (family, way, rate), some in groups.items()
    ]


def table(found: Sequence[Kept]) -> str:
    """Return one line per family and rate, with both ways side by side."""
    lines: dict[tuple[str, str], list[str]] = {}
    for row in rows(found):
        cell = f"{row['kept_whole']:.0%} of {row['kept_tokens']:.0%}"
        lines.setdefault((row["family"], row["rate"]), []).append(cell)
    return markdown(("family", "rate", *WAYS), [(*name, *cells) for name, cells in lines.items()])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.code_lines", description=__doc__
    )
    parser.add_argument("--config", type=Path, default=Path("cluster/local.yaml"))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first-seed", type=int, default=8000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    config = load(args.config).file.applications[0].args
    found = list(measure(config, args.prompts, args.tokens, args.first_seed))
    print(table(found))
    write_json(args.out, provenance(args.first_seed), {"rows": rows(found)})
    print(f"\nprompts with all that they need, of the kept share of tokens; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
