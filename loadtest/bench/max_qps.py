"""The paper's max-QPS protocol against plain `vllm serve` and this service: `make bench-qps`.

Requests of LongBench-like lengths come at a constant rate, which is raised until one of them
misses an end-to-end time-out (arXiv 2502.02789, section 5.2). The time-out is twice plain vLLM's
latency when idle, the paper's own proportion, and every rate is held for the same number of
time-outs: a queue that grows must have the time to show. Plain vLLM's rates are multiples of one
request per idle latency, this service's of `1 / (k + r)` times plain vLLM's rate. Both may use
the same cores: plain vLLM's engine with a thread for each, this service with a prefill replica of
one thread for each. Weights are random; the score is the demo pair's, see `versus`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specprefill.config import local_path
from specprefill.lab.loadtest import runner, session
from specprefill.lab.loadtest.outcome import RequestEnding, Stream
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.results import trial_table
from specprefill.lab.loadtest.scenario import PaperProtocol, Prompts, Scenario, Target
from specprefill.lab.loadtest.search import highest_rate
from specprefill.lab.loadtest.session import SearchResult
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from . import server_processes
from .servers import RunningServer, cores_option, run_ours, run_plain_vllm
from .ttft import flops_lines
from .versus import BASE, OUT, PLAIN, demo_scores, serve_config

LENGTHS = (4096, 6144, 8192, 10240)  # about what LongBench's prompts are
KEEPS = (0.1, 0.3)
PLAIN_STEPS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
STEPS = (0.7, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0, 2.2, 2.5, 3.0)
HOLD = 6.0  # time-outs; the paper's 128 requests last 9 of them at its highest rate
OUTPUT_TOKENS = 8
TIMEOUT_FACTOR = 2.0  # the paper: 10 s, where its 405B takes 5 s at its highest rate
MAX_FAILURES = 0  # the paper: 4 of 128, but here the slower server is asked far fewer
PAPER = {0.1: "7x", 0.3: "5x", 0.5: "-"}  # 405B; at 0.5 its baseline sustains no rate at all
IDLE_RUNS = 3  # after one that warms up
IDLE_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True)
class SustainedRate:
    """The highest rate of one server at one keep rate; None: not even the lowest one."""

    name: str
    qps: float | None
    searched: SearchResult
    ceiling: float | None = None  # of its rate over plain vLLM's; None: plain vLLM itself


def scenario(
    served: RunningServer,
    keep: float | None,
    lengths: Sequence[int],
    args: argparse.Namespace,
    timeout_s: float,
    grid: Sequence[float],
) -> Scenario:
    """Return the protocol against one server at one keep rate."""
    return Scenario(
        target=Target(address=served.url, model=served.model),
        tokenizer=local_path("models/demo-main"),
        prompts=tuple(
            Prompts(prompt_tokens=tokens, keep=keep, max_tokens=OUTPUT_TOKENS) for tokens in lengths
        ),
        arrivals={"kind": "constant", "qps": 1.0},
        length={"seconds": args.hold * timeout_s},
        timeout_s=timeout_s,
        warm_up=0,  # see `ask_alone`
        search=PaperProtocol(
            kind="paper", grid=tuple(grid), max_failures=MAX_FAILURES, pause_s=args.pause
        ),
        seed=args.seed,
    )


async def ask_alone(
    served: RunningServer, source: Source, lengths: Sequence[int], keep: float | None
) -> list[list[Stream]]:
    """Return answers of one request at a time, by length."""
    caller = session.caller_of(Target(address=served.url, model=served.model))
    answers = []
    async with caller.open():
        for tokens in lengths:
            kind = Prompts(prompt_tokens=tokens, keep=keep, max_tokens=OUTPUT_TOKENS)
            prompts = source.draw((kind,), IDLE_RUNS + 1, np.random.default_rng(0))
            runs = [await runner.stream(prompt, caller, IDLE_TIMEOUT_S) for prompt in prompts]
            for one in runs:
                if one.ending is not RequestEnding.ANSWERED:
                    raise RuntimeError(f"{served.url}: {one.error}")
            answers.append(runs[1:])
    return answers


def latency_s(answers: Sequence[Sequence[Stream]]) -> float:
    """Return the mean over the lengths of the median end-to-end latency."""
    return statistics.fmean(statistics.median(one.end_s for one in runs) for runs in answers)


def ceiling(answers: Sequence[Sequence[Stream]], idle_s: float) -> float:
    """Return 1 / (k + r) of section 4.3: the rate over plain vLLM's that pruning could sustain.

    k is the kept share of all tokens, r the speculator's time over plain vLLM's whole latency.
    Pools that have cores of their own may sustain more: 1 / max(k, r).
    """
    reports = [one.report for runs in answers for one in runs if one.report is not None]
    kept = sum(int(report["kept_tokens"]) for report in reports)
    tokens = sum(int(report["prompt_tokens"]) for report in reports)
    ratio = statistics.fmean(float(report["speculate_s"]) for report in reports) / idle_s
    return 1.0 / (kept / tokens + ratio)


def sustained_rate(
    name: str, searched: SearchResult, ceiling: float | None = None
) -> SustainedRate:
    """Return the highest rate that held."""
    return SustainedRate(name, highest_rate(searched.trials), searched, ceiling)


def table(
    plain: SustainedRate, pruned: Sequence[tuple[float, SustainedRate]], scores: Mapping[str, float]
) -> str:
    """Return requests per second, the ratio to plain vLLM's, and the demo pair's score."""
    headers = ("server", "max QPS", "vs vllm serve", "1/(k+r)", "score", "paper, 405B")
    rows = [[plain.name, _rate(plain.qps), "1.00x", "-", f"{scores[plain.name]:.0%}", "1x"]]
    for keep, one in pruned:
        times = "-" if one.qps is None or plain.qps is None else f"{one.qps / plain.qps:.2f}x"
        score = f"{scores[one.name]:.0%}" if one.name in scores else "-"
        bound = "-" if one.ceiling is None else f"{one.ceiling:.2f}x"
        rows.append([one.name, _rate(one.qps), times, bound, score, PAPER.get(keep, "-")])
    return markdown(headers, rows)


async def measure(
    args: argparse.Namespace, plain: RunningServer, mine: RunningServer
) -> tuple[float, SustainedRate, list[tuple[float, SustainedRate]]]:
    """Measure plain vLLM's idle latency and rate, and this service's rate at each keep rate."""
    source = Source.load(local_path("models/demo-main"), args.seed)
    idle_s = latency_s(await ask_alone(plain, source, args.lengths, None))
    timeout_s = TIMEOUT_FACTOR * idle_s
    print(f"vllm serve, idle: {idle_s:.2f} s; time-out {timeout_s:.2f} s", flush=True)

    async def search(
        served: RunningServer, keep: float | None, grid: Sequence[float], bound: float | None = None
    ) -> SustainedRate:
        await server_processes.wait_idle([plain.pid, mine.pid])
        name = PLAIN if keep is None else f"keep {keep:g}"
        asked = scenario(served, keep, args.lengths, args, timeout_s, grid)
        measure = session.measure_here(source, lambda _progress: None)
        found = sustained_rate(name, await session.find(asked, measure), bound)
        print(f"\n{name}\n{trial_table(found.searched.trials)}", flush=True)
        return found

    first = await search(plain, None, [step / idle_s for step in args.plain_steps])
    pruned = []
    for keep in args.keeps:
        bound = ceiling(await ask_alone(mine, source, args.lengths, keep), idle_s)
        reference = bound * (first.qps or 1.0 / idle_s)
        grid = [step * reference for step in args.steps]
        pruned.append((keep, await search(mine, keep, grid, bound)))
    return idle_s, first, pruned


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.max_qps", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--keeps", type=float, nargs="+", default=list(KEEPS))
    parser.add_argument(
        "--hold", type=float, default=HOLD, help="how long each rate is held, in time-outs"
    )
    parser.add_argument(
        "--plain-steps", type=float, nargs="+", default=list(PLAIN_STEPS),
        help="plain vLLM's rates, in multiples of one request per its idle latency",
    )  # fmt: skip
    parser.add_argument(
        "--steps", type=float, nargs="+", default=list(STEPS),
        help="this service's rates, in multiples of 1/(k+r) times plain vLLM's rate",
    )  # fmt: skip
    parser.add_argument("--pause", type=float, default=2.0, help="seconds between two rates")
    cores_option(parser)
    parser.add_argument("--items", type=int, default=10, help="questions of each score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-max-qps.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    folder = OUT.resolve() / "max-qps"
    folder.mkdir(parents=True, exist_ok=True)
    arithmetic = flops_lines(args.lengths)
    config = serve_config(folder, max(args.lengths) + 128)
    with (
        run_plain_vllm(config, args.cores, folder / "vllm.log") as plain,
        run_ours(Path(local_path(BASE)), folder, config, prefill_replicas=args.cores) as mine,
    ):
        idle_s, first, pruned = asyncio.run(measure(args, plain, mine))
    with run_ours(Path(local_path(BASE)), folder) as demo:
        scores = asyncio.run(demo_scores(args, demo))
    print(f"\n{table(first, pruned, scores)}")
    results: dict[str, Any] = {
        "arithmetic": arithmetic,
        "idle_s": idle_s,
        "timeout_s": TIMEOUT_FACTOR * idle_s,
        "hold_s": args.hold * TIMEOUT_FACTOR * idle_s,
        "cores": args.cores,
        "scores": scores,
        "rows": [_as_json(one) for one in (first, *(one for _, one in pruned))],
    }
    write_json(args.out, provenance(args.seed), results)
    print(f"written to {args.out}")
    return 0


def _as_json(one: SustainedRate) -> dict[str, Any]:
    trials = [asdict(trial) for trial in one.searched.trials]
    return {"name": one.name, "max_qps": one.qps, "ceiling": one.ceiling, "trials": trials}


def _rate(qps: float | None) -> str:
    return "below the grid" if qps is None else f"{qps:.3f}"


if __name__ == "__main__":
    sys.exit(main())
