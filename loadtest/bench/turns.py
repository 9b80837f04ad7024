"""Answers over the turns of a conversation: `python -m loadtest.bench.turns`.

The demo pair in this process, dense, with every turn selected anew, and with what earlier turns
kept carried over; and whether the fact that a turn asks about was kept (`--gold-only`: that
alone). In talks about a document the questions move to other facts of it, to new text, and back. In
an agent's loop, results of tools come in, and questions about them and earlier ones.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from specprefill.config import SelectionConfig, SpeculatorConfig, local_path
from specprefill.control.from_config import selection_policy
from specprefill.core.carry_over import KeptBefore, continue_selection
from specprefill.core.selection import SelectionPolicy, select
from specprefill.core.types import Plan, PlanKind, Reason, Selection
from specprefill.lab.evaluation.gold import survival
from specprefill.lab.evaluation.pair import MainModelAnswerer, load_answerer
from specprefill.lab.families import calls, seeded
from specprefill.lab.families.fitting import render
from specprefill.lab.families.task import Message, Scoring, Task
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.speculator.kept_memory import KeptMemory
from specprefill.synthetic import corpus

from .keep_rates import ScoredPrompt
from .scored_prompts import TaskScorer

OUT = Path("out")
MAIN, SPECULATOR = "models/demo-main", "models/demo-speculator"
KEEPS = (0.3, 0.1)
ANSWER_TOKENS, KV_BLOCK_TOKENS, MEMORY_BYTES = 24, 16, 1 << 24
RECORDS, IN_DOCUMENT, NEW_SENTENCES = 8, 5, 12
# What each turn asks about: a record of the document, or one in text that comes with the question.
SCRIPT = (("document", 0), ("moved", 1), ("new", 5), ("moved", 2), ("again", 5), ("again", 0))
# A record in a tool's result that comes with the question, or in an earlier one.
LOOP = (("result", 0), ("result", 1), ("again", 0), ("result", 2), ("result", 3), ("again", 1))
RESULTS = 4
Turn = tuple[str, list[Message], corpus.Record]


@dataclass(frozen=True, slots=True)
class Outcome:
    """One turn at one keep rate. Whether the record that it asks about was kept whole: `kept`,

    selected anew and carried over; whether the answer was right: `right`, dense and these two.
    """

    seed: int
    talk: str  # about a document, or in an agent's loop
    keep: float
    turn: int
    kind: str
    prompt_tokens: int
    anew_tokens: int  # kept, and computed, where every turn is selected anew
    carried_tokens: int
    computed_tokens: int  # kept beside them
    reason: str
    kept: tuple[bool, bool]
    right: tuple[bool, bool, bool] | None  # None: nobody was asked


def document_talk(seed: int, sentences: int) -> Iterator[Turn]:
    """Yield for each turn its kind, the messages so far, and the record that it asks about."""
    rng = random.Random(seed)
    records = corpus.records(rng, RECORDS)
    prose = seeded.prose(rng, sentences + NEW_SENTENCES)
    facts = tuple(record.text for record in records[:IN_DOCUMENT])
    document = " ".join(seeded.scatter(rng, prose[:sentences], facts))
    messages: list[Message] = []
    for kind, place in SCRIPT:
        record = records[place]
        parts = {
            "document": document,
            "new": " ".join(seeded.scatter(rng, prose[sentences:], (record.text,))),
        }
        text = "\n\n".join(filter(None, (parts.get(kind), corpus.question(rng, record))))
        messages.append({"role": "user", "content": text})
        yield kind, list(messages), record
        messages.append({"role": "assistant", "content": corpus.reply(record)})


def agent_loop(seed: int, sentences: int) -> Iterator[Turn]:
    """Yield the same for an agent whose tools' results have `sentences` in all."""
    rng = random.Random(seed)
    records = corpus.records(rng, RESULTS)
    prose, share = seeded.prose(rng, sentences), sentences // RESULTS
    messages: list[Message] = [{"role": "system", "content": calls.SYSTEM}]
    for number, (kind, place) in enumerate(LOOP):
        record = records[place]
        if kind == "result":
            part = prose[place * share : (place + 1) * share]
            result = " ".join(seeded.scatter(rng, part, (record.text,)))
            messages.append({"role": "user", "content": "Search the log."})
            messages += calls.tool_turn(f"call_{number}", number, result)
        messages.append({"role": "user", "content": corpus.question(rng, record)})
        yield kind, list(messages), record
        messages.append({"role": "assistant", "content": corpus.reply(record)})


TALKS = {"document": document_talk, "agent": agent_loop}


def hold(
    seed: int,
    talk: str,
    keeps: Sequence[float],
    sentences: int,
    scorer: TaskScorer,
    main: MainModelAnswerer | None,
) -> Iterator[Outcome]:
    """Hold one conversation at every keep rate; without `main` only select.

    A turn is scored, and answered dense, once for all of them.
    """
    policy = selection_policy(SelectionConfig(), KV_BLOCK_TOKENS)
    plans = [Plan(PlanKind.PRUNE, Reason.DEFAULT, keep) for keep in keeps]
    memories = [KeptMemory(MEMORY_BYTES) for _ in keeps]
    for turn, (kind, messages, record) in enumerate(TALKS[talk](seed, sentences), start=1):
        task = Task("turns", tuple(messages), (), (record.text,), 0, Scoring.ALL_REFERENCES, 0)
        prompt, scored = _prompt(messages, scorer), scorer.score_task(task)
        chosen = []
        for plan, memory in zip(plans, memories, strict=True):
            chosen.append(_selections(scored, plan, policy, memory.find(prompt)))
            memory.remember(prompt, chosen[-1][1], plan.reason)
        answered = _right(main, prompt, record, chosen)
        for keep, (anew, carried), right in zip(keeps, chosen, answered, strict=True):
            yield Outcome(
                seed,
                talk,
                keep,
                turn,
                kind,
                len(prompt),
                anew.kept_tokens,
                carried.carried_tokens,
                carried.kept_tokens - carried.carried_tokens,
                carried.plan.reason.value,
                (survival(scored.gold, anew) == 1.0, survival(scored.gold, carried) == 1.0),
                right,
            )


def _right(
    main: MainModelAnswerer | None,
    prompt: tuple[int, ...],
    record: corpus.Record,
    chosen: Sequence[tuple[Selection, Selection]],
) -> list[tuple[bool, bool, bool] | None]:
    """Ask the main model, dense and with both selections of each rate; None: nobody was asked."""
    if main is None:
        return [None] * len(chosen)
    whole = list(range(len(prompt)))
    pruned = [_positions(each) for pair in chosen for each in pair]
    answers = main.answers(prompt, [whole, *pruned], ANSWER_TOKENS)
    dense, *others = (record.value in answer for answer in answers)
    return [(dense, *pair) for pair in zip(others[::2], others[1::2], strict=True)]


def _prompt(messages: Sequence[Message], scorer: TaskScorer) -> tuple[int, ...]:
    text = render(tuple(messages), (), scorer.tokenizer)
    return tuple(scorer.tokenizer.encode(text, add_special_tokens=False))


def _selections(
    scored: ScoredPrompt, plan: Plan, policy: SelectionPolicy, before: KeptBefore | None
) -> tuple[Selection, Selection]:
    """Return what is kept anew, and what is kept with the earlier turns'."""
    given = (scored.scores, plan, scored.protected, policy, scored.certainty)
    anew = select(*given, scored.chunks)
    if before is None:
        return anew, anew
    return anew, continue_selection(*given, before, scored.chunks)


def _positions(selection: Selection) -> list[int]:
    return [place for run in selection.runs for place in range(run.start, run.stop)]


def rows(found: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Return the share of right answers and the computed tokens of later turns.

    There is a row for each kind of talk, turn and keep rate, and one for all turns of a talk.
    """
    made = []
    cells: dict[tuple[str, str, float], list[Outcome]] = {}
    for each in found:
        for kind in (each.kind, ALL) if each.turn > 1 else ():
            cells.setdefault((each.talk, kind, each.keep), []).append(each)
    for (talk, kind, keep), later in cells.items():
        right = [each.right for each in later if each.right is not None]
        means = [statistics.fmean(arm) for arm in zip(*right, strict=True)]
        shares: list[float] | list[None] = means or [None] * len(ARMS)
        anew_kept, carried_kept = map(
            statistics.fmean, zip(*(each.kept for each in later), strict=True)
        )
        made.append(
            {
                "talk": talk,
                "kind": kind,
                "keep": keep,
                "turns": len(later),
                "dense": shares[0],
                "anew": shares[1],
                "carried_over": shares[2],
                "anew_kept": anew_kept,
                "carried_over_kept": carried_kept,
                "anew_tokens": sum(each.anew_tokens for each in later) / len(later),
                "computed_tokens": sum(each.computed_tokens for each in later) / len(later),
                "reselected": sum(each.reason == Reason.RESELECTED for each in later),
            }
        )
    return made


ALL = "all later turns"
ARMS = ("dense", "anew", "carried_over")
HEADERS = (
    "talk", "asks about", "keep", "turns", "right: dense", "selected anew", "carried over",
    "kept whole: anew", "carried over", "computed anew", "computed, carried over", "reselected",
)  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return one line per row."""
    in_order = sorted(found, key=lambda row: (row["talk"], row["keep"], row["kind"] == ALL))
    return markdown(HEADERS, [_cells(row) for row in in_order])


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["talk"],
        row["kind"],
        f"{row['keep']:g}",
        str(row["turns"]),
        *("" if row[arm] is None else f"{row[arm]:.0%}" for arm in ARMS),
        *(f"{row[arm]:.0%}" for arm in ("anew_kept", "carried_over_kept")),
        f"{row['anew_tokens']:.0f} tokens",
        f"{row['computed_tokens']:.0f} tokens",
        str(row["reselected"]),
    ]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.turns", description=__doc__)
    parser.add_argument("--conversations", type=int, default=10)
    parser.add_argument(
        "--sentences", type=int, default=200, help="of the document, or of all results"
    )
    parser.add_argument("--talks", nargs="+", choices=list(TALKS), default=list(TALKS))
    parser.add_argument("--first-seed", type=int, default=1000)
    parser.add_argument("--gold-only", action="store_true", help="ask nobody: what is kept")
    parser.add_argument("--out", type=Path, default=OUT / "bench-turns.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    config = SpeculatorConfig(path=SPECULATOR, dtype="float32")
    scorer = TaskScorer.load(config)
    main_model = None
    if not args.gold_only:
        tokenizer = AutoTokenizer.from_pretrained(local_path(MAIN))
        main_model = load_answerer(MAIN, config, tokenizer)
    found: list[Outcome] = []
    for seed in range(args.first_seed, args.first_seed + args.conversations):
        for talk in args.talks:
            found += hold(seed, talk, KEEPS, args.sentences, scorer, main_model)
            print(f"seed {seed}, {talk}: {found[-1].prompt_tokens} tokens", flush=True)
    summary = rows(found)
    print(
        f"\n{table(summary)}\n\nright answers, and tokens to compute, of turns 2 to {len(SCRIPT)}"
    )
    write_json(args.out, provenance(args.first_seed), {"rows": summary})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
