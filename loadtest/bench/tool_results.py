"""What is kept of a fact in a tool's result that ends the prompt: `make bench-tool-results`.

A search of real prose has found four numbers; one of them is wanted. The question names it, or only
the call does. The draft of a deployment file scores by its look-ahead (the paper's way), by the
prompt's end, and by an echo of the question and the call. Without the main model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from specprefill.config import AppConfig, local_path
from specprefill.control.from_config import selection_policy
from specprefill.core.selection import Scores, select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason
from specprefill.deployment.file import load
from specprefill.lab.evaluation.gold import survival
from specprefill.lab.evaluation.prompts import RenderedTask, Renderer
from specprefill.lab.families.catalog import generate
from specprefill.lab.families.task import Task
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.speculator.chunking import Chunker
from specprefill.speculator.method import PAPER, Queries, ScoringMethod
from specprefill.speculator.rating import rate
from specprefill.speculator.scorer import Scorer, load_scorer
from specprefill.speculator.translation import SamePrompt

OUT = Path("out") / "bench-tool-results.json"
KEEPS = (0.3, 0.2, 0.1)
VAGUE = "Look it up in the text, and tell me what it says."
NAMED_BY = ("the question", "only the call")


@dataclass(frozen=True, slots=True)
class Kept:
    """Whether one prompt's fact was kept whole, by keep rate."""

    named_by: str
    scored_by: str
    whole: tuple[bool, ...]
    automatic: bool  # whether it was kept whole at the automatic rate
    automatic_keep: float  # the share of the prompt that this kept


def with_call_in_text(task: Task, *, is_vague: bool) -> Task:
    """Return the task with its call as text: not every template writes calls.

    `is_vague`: only the call names what is wanted.
    """
    question, call, result = task.messages
    function = call["tool_calls"][0]["function"]
    text = json.dumps({"name": function["name"], "arguments": json.loads(function["arguments"])})
    with_text = {"role": "assistant", "content": f"<tool_call>\n{text}\n</tool_call>"}
    asked = {"role": "user", "content": VAGUE if is_vague else question["content"]}
    return replace(task, messages=(asked, with_text, result), tools=())


def ways_to_score(scorer: Scorer, prompt: RenderedTask) -> Iterator[tuple[str, Scores, float]]:
    """Yield the scores of one prompt by each way, and how certain the draft was."""
    own = scorer.method
    echo = scorer.echo_of(SamePrompt(prompt.ids), prompt.asked)
    by_end = replace(PAPER, queries=Queries.QUESTION)
    (ahead, ended), certainty = _rated(scorer, prompt, (), [PAPER, by_end])
    yield "look-ahead", ahead, certainty
    yield "the prompt's end", ended, certainty
    methods = {"echo, maximum": PAPER, "echo, squares": PAPER.of_echo}
    if own.heads is not None:
        methods["echo, the deployment's heads"] = own
    echoed, certainty = _rated(scorer, prompt, echo, list(methods.values()))
    for name, scores in zip(methods, echoed, strict=True):
        yield name, scores, certainty


def _rated(
    scorer: Scorer,
    prompt: RenderedTask,
    echo: tuple[int, ...],
    methods: Sequence[ScoringMethod],
) -> tuple[list[Scores], float]:
    with scorer.open_readings([prompt.ids], echoes=[echo]) as (reading,):
        scorer.read([reading])
        scorer.look_ahead([reading])
        rated = [rate(reading, method, scorer.pool_tokens) for method in methods]
        return rated, reading.certainty


def measure(config: AppConfig, prompts: int, tokens: int, first_seed: int) -> Iterator[Kept]:
    """Yield what is kept of each prompt's fact."""
    tokenizer = AutoTokenizer.from_pretrained(local_path(config.speculator.path))
    in_every_way = config.speculator.model_copy(update={"score_queries": Queries.BOTH.value})
    scorer = load_scorer(in_every_way, config.selection.pool_tokens)
    renderer = Renderer(tokenizer, config.selection.tail_tokens)
    chunker = Chunker.of(config.selection, tokenizer)
    policy = selection_policy(config.selection)
    within = KeepRange(config.selection.floor, config.selection.ceiling)
    automatic = Plan(PlanKind.PRUNE, Reason.AUTO, within=within)
    for seed in range(first_seed, first_seed + prompts):
        task = generate("prose_tool_result", seed, tokens, tokenizer)
        for named_by in NAMED_BY:
            asked = with_call_in_text(task, is_vague=named_by == NAMED_BY[1])
            prompt = renderer.prompt(asked)
            chunks = chunker.chunks(prompt.ids)
            for scored_by, scores, certainty in ways_to_score(scorer, prompt):
                choose = partial(
                    select,
                    scores,
                    protected=prompt.protected,
                    policy=policy,
                    certainty=certainty,
                    chunks=chunks,
                )
                fixed = [choose(Plan(PlanKind.PRUNE, Reason.ASKED, keep)) for keep in KEEPS]
                chosen = choose(automatic)
                *whole, by_scores = (survival(prompt.gold, one) == 1.0 for one in (*fixed, chosen))
                yield Kept(named_by, scored_by, tuple(whole), by_scores, chosen.keep_rate)


def rows(found: Sequence[Kept]) -> list[dict[str, Any]]:
    """Return the share of facts that each way keeps whole."""
    by_way: dict[tuple[str, str], list[Kept]] = {}
    for each in found:
        by_way.setdefault((each.named_by, each.scored_by), []).append(each)
    return [
        {
            "named_by": named_by,
            "scored_by": scored_by,
            "prompts": len(some),
            "kept_whole": {
                f"{keep:g}": statistics.fmean(column)
                for keep, column in zip(
                    KEEPS, zip(*(each.whole for each in some), strict=True), strict=True
                )
            },
            "automatic": statistics.fmean(each.automatic for each in some),
            "automatic_keep": statistics.fmean(each.automatic_keep for each in some),
        }
        for (named_by, scored_by), some in by_way.items()
    ]


def table(found: Sequence[Kept]) -> str:
    """Return one line per way."""
    keeps = (f"keep {keep:g}" for keep in KEEPS)
    headers = ("wanted is named by", "scored by", "prompts", *keeps, "automatic, which keeps")
    return markdown(
        headers,
        [
            (
                str(row["named_by"]),
                str(row["scored_by"]),
                str(row["prompts"]),
                *(f"{share:.0%}" for share in row["kept_whole"].values()),
                f"{row['automatic']:.0%}, {row['automatic_keep']:.0%}",
            )
            for row in rows(found)
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    name = "python -m loadtest.bench.tool_results"
    parser = argparse.ArgumentParser(prog=name, description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("cluster/local.yaml"))
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--first-seed", type=int, default=7000)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    config = load(args.config).file.applications[0].args
    found = list(measure(config, args.prompts, args.tokens, args.first_seed))
    print(table(found))
    write_json(args.out, provenance(args.first_seed), {"rows": rows(found)})
    print(f"\nfacts kept whole; written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
