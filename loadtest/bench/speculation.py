"""Speculative decoding by proposals from the prompt: `make bench-speculation`.

Three ways on the same engine and the same pruned prompts: no proposals, vLLM's n-gram proposals
from the kept tokens, and from the whole prompt. Greedy answers must be equal, or the bench fails.

The quoting prompts hold, in their dropped tokens, the very answer that the model gives: as if it
quoted a text that it knows, or that is in its prompt twice. The ordinary prompts are the same
without it. Both have random weights of `bench.ttft`'s size, whose steps cost what they cost. The
demo pair copies what was kept, from prompts that its speculator has pruned.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specprefill.config import (
    AppConfig,
    DecodeConfig,
    MainModel,
    SelectionConfig,
    SpeculationConfig,
    SpeculatorConfig,
    local_path,
)
from specprefill.core.types import Plan, PlanKind, Reason, Request, Selection, Span
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from . import ttft

if TYPE_CHECKING:
    from specprefill.decode.service import DecodeService

OUT = Path("out")
MODELS = Path("models")
QUOTING, ORDINARY, COPYING = "quotes dropped text", "ordinary", "copies kept text"
OFF, KEPT, WHOLE = "off", "kept tokens", "whole prompt"
DEMO_FAMILIES = ("niah_multikey_3", "copy")
SEGMENT = 64  # tokens that are kept or dropped together, of a random prompt
_COUNTERS = {
    "vllm:spec_decode_num_draft_tokens_total": "proposed",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
}


@dataclass(frozen=True, slots=True)
class Case:
    """A pruned prompt of a workload."""

    workload: str
    request: Request
    selection: Selection


@dataclass(frozen=True, slots=True)
class Run:
    """One answer in one way."""

    case: str
    workload: str
    way: str
    tokens: tuple[int, ...]
    seconds: float  # from the first token to the last
    steps: int
    proposed: int
    accepted: int


async def answer(service: DecodeService, way: str, case: Case) -> Run:
    """Answer one prompt, which the decode engine computes itself."""
    before = counters()
    tokens: list[int] = []
    arrivals_s: list[float] = []
    steps = service.decode(case.request, case.selection, None, ((),), 600.0)
    async for step in steps:
        tokens += step.chunk.token_ids
        arrivals_s.append(time.perf_counter())
    spent = {name: count - before[name] for name, count in counters().items()}
    seconds = arrivals_s[-1] - arrivals_s[0]
    return Run(
        case.request.request_id,
        case.workload,
        way,
        tuple(tokens),
        seconds,
        len(arrivals_s),
        **spent,
    )


def counters() -> dict[str, int]:
    """Return how many tokens the engine of this process has proposed and accepted so far."""
    from prometheus_client import REGISTRY

    found = dict.fromkeys(_COUNTERS.values(), 0)
    for sample in (one for metric in REGISTRY.collect() for one in metric.samples):
        if sample.name in _COUNTERS:
            found[_COUNTERS[sample.name]] += int(sample.value)
    return found


@asynccontextmanager
async def decoding(
    config: AppConfig, speculation: SpeculationConfig | None
) -> AsyncIterator[Mapping[str, DecodeService]]:
    """Start one decode engine; yield its ways."""
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    decode = config.decode.model_copy(update={"speculation": speculation})
    engine = Engine(engine_args(config.model, decode, config.kv, Role.DECODE))
    async with DecodeService(engine) as service:
        if speculation is None:
            yield {OFF: service}
        else:
            yield {KEPT: DecodeService(engine, whole_prompts=False), WHOLE: service}


async def measure(
    config: AppConfig, cases: Sequence[Case], speculation: SpeculationConfig, repeats: int
) -> list[Run]:
    """Answer every case in every way; ways that share an engine take turns."""
    runs = await _measure_ways(config, None, cases, repeats)
    answers = [run.tokens for run in runs[: len(cases)]]
    return runs + await _measure_ways(
        config,
        speculation,
        [_with_quote(case, tokens) for case, tokens in zip(cases, answers, strict=True)],
        repeats,
    )


async def _measure_ways(
    config: AppConfig,
    speculation: SpeculationConfig | None,
    cases: Sequence[Case],
    repeats: int,
) -> list[Run]:
    runs: list[Run] = []
    async with decoding(config, speculation) as ways:
        for way, service in ways.items():
            await answer(service, way, cases[0])
        for repeat in range(repeats):
            for case in cases:
                runs += [await answer(service, way, case) for way, service in ways.items()]
            print(f"{', '.join(ways)}: run {repeat + 1} of {repeats}", flush=True)
    return runs


def _with_quote(case: Case, tokens: Sequence[int]) -> Case:
    """Return the case with its answer in its first dropped run, for the quoting workload."""
    if case.workload != QUOTING:
        return case
    start = case.selection.runs[0].stop
    prompt = case.request.prompt
    quoting = (*prompt[:start], *tokens, *prompt[start + len(tokens) :])
    return replace(case, request=replace(case.request, prompt=quoting))


def random_cases(
    count: int, prompt_tokens: int, keep: float, output_tokens: int, vocabulary: int, seed: int
) -> list[Case]:
    """Return both workloads of random prompts: head, tail, and segments at random are kept.

    The first dropped run has room for an answer.
    """
    cases = []
    for workload, number in itertools.product((QUOTING, ORDINARY), range(count)):
        rng = random.Random(f"{seed}/{workload}/{number}")
        asked = ttft.request(prompt_tokens, keep, vocabulary, rng, output_tokens)
        first = SEGMENT + -(-output_tokens // SEGMENT) * SEGMENT
        starts = range(first, prompt_tokens - SEGMENT, SEGMENT)
        chosen = sorted(rng.sample(starts, int(keep * len(starts))))
        ends = (0, *chosen, prompt_tokens - SEGMENT)
        cases.append(Case(workload, asked, _selection(prompt_tokens, ends, keep)))
    return cases


def _selection(prompt_tokens: int, starts: Sequence[int], keep: float) -> Selection:
    runs: list[Span] = []
    for start in starts:
        stop = min(start + SEGMENT, prompt_tokens)
        if runs and runs[-1].stop >= start:
            runs[-1] = Span(runs[-1].start, stop)
        else:
            runs.append(Span(start, stop))
    return Selection(prompt_tokens, tuple(runs), Plan(PlanKind.PRUNE, Reason.ASKED, keep))


def demo_cases(count: int, prompt_tokens: int, keep: float, seed: int) -> list[Case]:
    """Return tasks that the demo pair answers by copying, pruned by its speculator."""
    from transformers import AutoTokenizer
    from vllm.sampling_params import SamplingParams

    from specprefill.control.from_config import selection_policy
    from specprefill.core.selection import select
    from specprefill.lab.families.catalog import generate
    from specprefill.lab.families.fitting import render
    from specprefill.speculator.chunking import Chunker
    from specprefill.speculator.scorer import load_scorer

    selection = SelectionConfig()
    draft = SpeculatorConfig(path=str(MODELS / "demo-speculator"), dtype="float32")
    scorer, policy = (
        load_scorer(draft, selection.pool_tokens),
        selection_policy(selection),
    )
    tokenizer = AutoTokenizer.from_pretrained(local_path(draft.path))
    chunker = Chunker.of(selection, tokenizer)
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, keep)
    cases = []
    for family, number in itertools.product(DEMO_FAMILIES, range(count)):
        task = generate(family, seed + number, prompt_tokens, tokenizer)
        text = render(task.messages, task.tools, tokenizer)
        prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
        sampling = SamplingParams(temperature=0.0, max_tokens=task.max_tokens)
        asked = Request(f"{family}-{number}", prompt, msgspec.msgpack.encode(sampling))
        chosen = select(scorer.score([prompt])[0], plan, (), policy, chunks=chunker.chunks(prompt))
        cases.append(Case(COPYING, asked, chosen))
    return cases


def configurations(prompt_tokens: int, output_tokens: int) -> tuple[AppConfig, AppConfig, int]:
    """Return the random main model's configuration, the demo pair's, and the vocabulary's size."""
    config, vocabulary = ttft.prepare(prompt_tokens + output_tokens)
    decode = DecodeConfig(**config.decode.model_dump())
    config = config.model_copy(update={"decode": decode})
    write_weights(Path(config.model.path))
    written = config.model.model_copy(update={"load_format": "auto"})
    demo = MainModel(path=str(MODELS / "demo-main"), dtype="float32", max_model_len=8192)
    return (
        config.model_copy(update={"model": written}),
        config.model_copy(update={"model": demo}),
        vocabulary,
    )


def write_weights(folder: Path) -> None:
    """Write random weights, wide enough for answers that do not repeat one token."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    config = AutoConfig.from_pretrained(folder, tie_word_embeddings=False, initializer_range=0.08)
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


def changed_answers(runs: Sequence[Run]) -> list[str]:
    """Return the prompts that were answered in more than one way."""
    answers: dict[str, set[tuple[int, ...]]] = {}
    for run in runs:
        answers.setdefault(run.case, set()).add(run.tokens)
    return [case for case, given in answers.items() if len(given) > 1]


def summary(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return one row per workload and way."""
    keys = dict.fromkeys((run.workload, run.way) for run in runs)
    return [
        _row(workload, way, [run for run in runs if (run.workload, run.way) == (workload, way)])
        for workload, way in sorted(
            keys, key=lambda key: (key[0], (OFF, KEPT, WHOLE).index(key[1]))
        )
    ]


def _row(workload: str, way: str, runs: Sequence[Run]) -> dict[str, Any]:
    tokens = sum(len(run.tokens) for run in runs)
    steps = sum(run.steps for run in runs)
    proposed, accepted = sum(run.proposed for run in runs), sum(run.accepted for run in runs)
    later = [(run.seconds, len(run.tokens) - 1) for run in runs if len(run.tokens) > 1]
    itl_s = statistics.median(seconds / count for seconds, count in later)
    return {
        "workload": workload,
        "proposals": way,
        "answers": len(runs),
        "tokens": tokens,
        "proposed": proposed,
        "accepted": accepted,
        "acceptance": accepted / proposed if proposed else None,
        "tokens_per_step": tokens / steps,
        "itl_s": itl_s,
        "tokens_per_s": sum(count for _, count in later) / sum(seconds for seconds, _ in later),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per row."""
    headers = ("answer", "proposals from", "accepted", "tokens a step", "ITL", "tokens/s")
    return markdown(headers, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    accepted = "-" if row["acceptance"] is None else f"{row['acceptance']:.0%}"
    return [
        row["workload"],
        row["proposals"],
        f"{accepted} of {row['proposed']}" if row["proposed"] else accepted,
        f"{row['tokens_per_step']:.2f}",
        f"{row['itl_s'] * 1e3:.2f} ms",
        f"{row['tokens_per_s']:.0f}",
    ]


async def run(options: argparse.Namespace) -> list[Run]:
    """Measure the random model, then the demo pair."""
    speculation = SpeculationConfig(
        tokens=options.propose, min_match=options.min_match, max_match=options.max_match
    )
    large, demo, vocabulary = configurations(options.tokens, options.output)
    cases = random_cases(
        options.prompts, options.tokens, options.keep, options.output, vocabulary, options.seed
    )
    runs = await measure(large, cases, speculation, options.repeats)
    copied = demo_cases(options.prompts, options.demo_tokens, options.keep, options.seed)
    runs += await measure(demo, copied, speculation, options.repeats)
    changed = changed_answers(runs)
    if changed:
        raise RuntimeError(f"greedy answers changed with proposals: {', '.join(changed)}")
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _options(argv)
    from .pools import set_cpu_environment

    set_cpu_environment()
    rows = summary(asyncio.run(run(options)))
    print(f"\n{table(rows)}\n\nequal greedy answers in every way; {options.tokens} tokens "
          f"({COPYING}: {options.demo_tokens}), keep {options.keep:g}, up to {options.propose} "
          f"proposed a step, one request at a time")  # fmt: skip
    asked = {name: value for name, value in vars(options).items() if name != "out"}
    write_json(options.out, provenance(options.seed), {"options": asked, "rows": rows})
    print(f"written to {options.out}")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    defaults = SpeculationConfig()
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.speculation",
                                     description=__doc__)  # fmt: skip
    parser.add_argument("--tokens", type=int, default=4096, help="length of random prompts")
    parser.add_argument("--demo-tokens", type=int, default=1536, help="length of the demo's")
    parser.add_argument("--output", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--keep", type=float, default=0.3)
    parser.add_argument("--prompts", type=int, default=4, help="of each workload and family")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--propose", type=int, default=defaults.tokens, help="tokens a step")
    parser.add_argument("--min-match", type=int, default=defaults.min_match)
    parser.add_argument("--max-match", type=int, default=defaults.max_match)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-speculation.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
