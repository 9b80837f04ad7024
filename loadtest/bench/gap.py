"""The gap between the first two tokens, and the part of the transfer in it: `make bench-kv`.

The same prompts on the same two engines, decode starting to pull when prefill has answered
(late) and while prefill computes its last chunk (early), in turn. Models as in `bench.ttft`.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from specprefill.config import AppConfig
from specprefill.core.types import Report, Request
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from . import ttft

if TYPE_CHECKING:
    from specprefill.core.ports import Answerer

OUT = Path("out")
OUTPUT_TOKENS = 16
WAYS = {"late": False, "early": True}


@dataclass(frozen=True, slots=True)
class GapRun:
    """The arrival of each token of one answer, and its report."""

    way: str
    token_s: tuple[float, ...]  # since the request
    report: Report

    @property
    def gap_s(self) -> float:
        """Seconds between the first token and the second."""
        return self.token_s[1] - self.token_s[0]

    @property
    def itl_s(self) -> float:
        """Median seconds between later tokens."""
        return statistics.median(
            later - earlier for earlier, later in itertools.pairwise(self.token_s[1:])
        )


async def answer(pipeline: Answerer, way: str, asked: Request) -> GapRun:
    """Run one request to its end. Raises RuntimeError unless tokens came one by one."""
    started_s = time.perf_counter()
    token_s, report = [], None
    async for chunk in pipeline.generate(asked):
        token_s += [time.perf_counter() - started_s] * len(chunk.token_ids)
        report = chunk.report or report
    if report is None or len(token_s) != OUTPUT_TOKENS:
        raise RuntimeError(f"{len(token_s)} tokens came, not {OUTPUT_TOKENS}")
    return GapRun(way, tuple(token_s), report)


async def measure(
    config: AppConfig, prompt_tokens: int, keep: float, repeats: int, vocabulary: int, seed: int
) -> list[GapRun]:
    """Run both ways `repeats` times, interleaved, after one warm-up each."""
    from .pools import local_pipeline

    rng = random.Random(seed)
    runs: list[GapRun] = []
    async with local_pipeline(config) as pipeline:
        inner = pipeline.pipeline
        pipelines = {
            way: replace(pipeline, pipeline=replace(inner, overlap=early))
            for way, early in WAYS.items()
        }
        for repeat in range(repeats + 1):
            for way, one in pipelines.items():
                asked = ttft.request(prompt_tokens, keep, vocabulary, rng, OUTPUT_TOKENS)
                run = await answer(one, way, asked)
                if repeat > 0:
                    runs.append(run)
                    print(f"run {repeat} of {repeats}, {way}: {run.gap_s * 1e3:.1f} ms", flush=True)
    return runs


def summary(runs: Sequence[GapRun]) -> list[dict[str, Any]]:
    """Return the medians of each way, and the hidden part of the transfer beside the late way's."""
    late_s = _median_of(runs, "late", lambda run: run.report.transfer_s)
    return [
        {
            "way": way,
            "ttft_s": _median_of(runs, way, lambda run: run.report.ttft_s),
            "transfer_s": _median_of(runs, way, lambda run: run.report.transfer_s),
            "hidden": 1.0 - _median_of(runs, way, lambda run: run.report.transfer_s) / late_s,
            "gap_s": _median_of(runs, way, lambda run: run.gap_s),
            "itl_s": _median_of(runs, way, lambda run: run.itl_s),
            "gap_itl": _median_of(runs, way, lambda run: run.gap_s / run.itl_s),
        }
        for way in WAYS
    ]


def _median_of(runs: Sequence[GapRun], way: str, value: Callable[[GapRun], float]) -> float:
    return statistics.median(value(run) for run in runs if run.way == way)


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per way."""
    headers = ("decode begins", "TTFT", "transfer", "of it hidden", "token 1 to 2", "ITL", "in ITL")
    return markdown(headers, [_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[str]:
    return [
        row["way"],
        f"{row['ttft_s']:.3f} s",
        f"{row['transfer_s'] * 1e3:.1f} ms",
        f"{row['hidden']:.0%}",
        f"{row['gap_s'] * 1e3:.1f} ms",
        f"{row['itl_s'] * 1e3:.1f} ms",
        f"{row['gap_itl']:.2f}",
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    options = _options(argv)
    from .pools import set_cpu_environment

    set_cpu_environment()
    config, vocabulary = ttft.prepare(options.tokens + 64)
    runs = asyncio.run(
        measure(config, options.tokens, options.keep, options.repeats, vocabulary, options.seed)
    )
    rows = summary(runs)
    print(f"\n{table(rows)}\n\n{options.tokens} tokens, keep {options.keep:g}; median of "
          f"{options.repeats} interleaved runs")  # fmt: skip
    results = {
        "prompt_tokens": options.tokens,
        "keep": options.keep,
        "rows": rows,
        "token_s": [{"way": run.way, "seconds": run.token_s} for run in runs],
    }
    write_json(options.out, provenance(options.seed), results)
    print(f"written to {options.out}")
    return 0


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.gap", description=__doc__)
    parser.add_argument("--tokens", type=int, default=8192, help="prompt length")
    parser.add_argument("--keep", type=float, default=0.1)
    parser.add_argument("--repeats", type=int, default=7, help="counted runs of each way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-gap.json")
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
