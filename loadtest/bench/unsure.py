"""What `selection.recompute_below` costs and saves: `make bench-unsure`.

Each prompt is answered pruned and dense. From how sure the main model was of the pruned answer's
first token follows, for every limit, which prompts would be prefilled again, and which of the two
answers would be sent. One real engine per pool; the draft and the main model are those of a
deployment file.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
from transformers import AutoTokenizer

from specprefill.config import AppConfig, local_path
from specprefill.core.ports import Answerer, Prefiller, Prefilling
from specprefill.core.types import Controls, Request, Selection
from specprefill.deployment.file import load
from specprefill.lab.evaluation.prompts import Renderer
from specprefill.lab.families.catalog import generate
from specprefill.lab.families.judging import score
from specprefill.lab.families.task import Task
from specprefill.lab.reporting.tables import markdown, provenance, write_json

OUT = Path("out") / "bench-unsure.json"
FAMILIES = (
    "needles", "niah_multikey_2", "niah_multivalue", "kv_retrieval", "vt", "tool_call",
    "recall_5_turns", "code_return",
)  # fmt: skip
RATES = {
    "0.3": Controls(keep=0.3),
    "0.1": Controls(keep=0.1),
    "automatic": Controls(auto=True),
}
LIMITS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)
ASKING = 1e-9  # a limit that no answer is below: the engine is asked, and nothing recomputed


@dataclass(slots=True)
class NotingPrefiller:
    """A prefill pool that notes how sure the last first token was."""

    inner: Prefiller
    sureness: list[float] = field(default_factory=list)

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilling]:
        """See `ports.Prefiller`."""
        async with self.inner.prefill(request, selection, timeout_s) as prefilling:
            yield prefilling
            prefilled = await prefilling.result()
            if prefilled.sureness is not None:
                self.sureness.append(prefilled.sureness)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt's two answers: how right each is, and what the pruned one's engine computed."""

    family: str
    rate: str
    sureness: float
    pruned: float  # score in [0, 1]
    dense: float
    prompt_tokens: int
    kept_tokens: int


async def measure(
    config: AppConfig, families: Sequence[str], prompts: int, tokens: int, first_seed: int
) -> AsyncIterator[Pair]:
    """Yield each prompt's answers at each rate."""
    from .pools import local_pipeline

    tokenizer = AutoTokenizer.from_pretrained(local_path(config.model.path))
    renderer = Renderer(tokenizer, config.selection.tail_tokens)
    seeds = range(first_seed, first_seed + prompts)
    async with local_pipeline(config) as pipeline:
        noting = NotingPrefiller(pipeline.pipeline.prefiller)
        pipeline.pipeline.prefiller, pipeline.pipeline.recompute_below = noting, ASKING
        for family, seed in itertools.product(families, seeds):
            task = generate(family, seed, tokens, tokenizer)
            dense, _ = await _ask(pipeline, renderer, task, Controls(prune=False))
            for rate, controls in RATES.items():
                pruned, kept = await _ask(pipeline, renderer, task, controls)
                sureness = noting.sureness.pop() if noting.sureness else 1.0  # 1: it went dense
                yield Pair(family, rate, sureness, pruned, dense, task.prompt_tokens, kept)


async def _ask(
    pipeline: Answerer, renderer: Renderer, task: Task, controls: Controls
) -> tuple[float, int]:
    """Return the answer's score and the kept tokens."""
    from vllm.sampling_params import SamplingParams

    prompt = renderer.prompt(task)
    asked = Request(
        f"unsure-{uuid.uuid4().hex}",
        prompt.ids,
        msgspec.msgpack.encode(SamplingParams(temperature=0.0, max_tokens=task.max_tokens)),
        protected=prompt.protected,
        asked=prompt.asked,
        controls=controls,
    )
    text, kept = "", 0
    async for chunk in pipeline.generate(asked):
        text += chunk.text
        kept = kept if chunk.report is None else chunk.report.kept_tokens
    return score(task, text), kept


def rows(pairs: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """Yield by rate and limit: answers that are right, prompts computed again, tokens computed."""
    for rate, limit in itertools.product(RATES, LIMITS):
        some = [pair for pair in pairs if pair.rate == rate]
        again = [pair for pair in some if pair.sureness < limit]
        right = sum(pair.dense if pair.sureness < limit else pair.pruned for pair in some)
        computed = sum(pair.kept_tokens for pair in some)
        computed += sum(pair.prompt_tokens for pair in again)
        yield {
            "keep": rate,
            "recompute_below": limit,
            "score": right / len(some),
            "dense_score": statistics.fmean(pair.dense for pair in some),
            "again": len(again) / len(some),
            "in_vain": _in_vain(again),
            "computed": computed / sum(pair.prompt_tokens for pair in some),
        }


def _in_vain(again: Sequence[Pair]) -> float | None:
    """Return the share that is no better for having been computed again."""
    return statistics.fmean(pair.dense <= pair.pruned for pair in again) if again else None


def table(pairs: Sequence[Pair]) -> str:
    """Return one line per rate and limit."""
    lines = [
        (
            row["keep"],
            f"{row['recompute_below']:g}",
            f"{row['score']:.1%} of {row['dense_score']:.1%}",
            f"{row['again']:.0%}",
            "-" if row["in_vain"] is None else f"{row['in_vain']:.0%}",
            f"{row['computed']:.0%}",
        )
        for row in rows(pairs)
    ]
    headers = ("keep", "limit", "score, of dense", "again", "of them in vain", "tokens computed")
    return markdown(headers, lines)


def bench_config(config: AppConfig) -> AppConfig:
    """Return the deployment's configuration with every prompt computed by the prefill pool."""
    return config.model_copy(
        update={
            "selection": config.selection.model_copy(
                update={"min_prompt_tokens": 1, "min_gain": None}
            ),
            "kv": config.kv.model_copy(update={"local_prefill_tokens": 0}),
        }
    )


async def _collect(config: AppConfig, args: argparse.Namespace) -> list[Pair]:
    pairs = []
    async for pair in measure(config, args.families, args.prompts, args.tokens, args.first_seed):
        pairs.append(pair)
        print(pair, file=sys.stderr, flush=True)
    return pairs


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.unsure", description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("cluster/local.yaml"))
    parser.add_argument("--families", nargs="+", default=FAMILIES)
    parser.add_argument("--prompts", type=int, default=12, help="of each family")
    parser.add_argument("--tokens", type=int, default=3072)
    parser.add_argument("--first-seed", type=int, default=8200)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    from .pools import set_cpu_environment

    set_cpu_environment()
    config = bench_config(load(args.config).file.applications[0].args)
    pairs = asyncio.run(_collect(config, args))
    print(table(pairs))
    write_json(args.out, provenance(args.first_seed), {"rows": list(rows(pairs))})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
