"""Time to first token beside plain `vllm serve` of the same model on the same cores: `make bench`.

Both servers run on this machine at the same time and are asked in turns over HTTP, one request
at a time, so that a slow minute of the machine hits both. Weights are random, since time does
not depend on them; the answers' score in the same row is the demo pair's, on needle questions
pruned to the same rate.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

from specprefill.config import AppConfig, local_path
from specprefill.lab.loadtest.http_stream import HttpCaller
from specprefill.lab.loadtest.outcome import RequestEnding, Stream
from specprefill.lab.loadtest.recorder import LoadPrompt
from specprefill.lab.loadtest.runner import stream
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.synthetic.needles import ChatTokenizer, NeedlePrompt, needle_prompt

from . import processes, server_processes
from .servers import MODEL, RunningServer, run_ours, run_plain_vllm
from .ttft import (
    MAIN,
    MAX_FLOPS_SHARE,
    SPECULATOR,
    Shape,
    configuration,
    flops_lines,
    write_model,
)

OUT = Path("out")
BASE = "cluster/local.yaml"
LENGTHS = (1024, 4096, 8192)
SHORT_LENGTHS = (128, 512)
TRIES = 4
QUIET_CORES = 0.2  # that others may take while an answer is measured
WARM_UP_TOKENS = 1024  # or fewer, where all prompts are shorter
KEEPS = (0.5, 0.3, 0.1)
PAPER = {0.1: "6.69x", 0.3: "2.75x", 0.5: "1.82x"}  # 405B, LongBench (arXiv 2502.02789, fig. 3)
OUTPUT_TOKENS = 4
SHORT_OUTPUT_TOKENS = 48
ANSWER_TOKENS = 16
TIMEOUT_S = 600.0
SCORE_TOKENS = 4096  # the longest prompts that the demo pair was trained on
PLAIN = "vllm serve"
OURS = "specprefill"
DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to have a prompt answered."""

    name: str
    server: str
    keep: float | str | None


UNPRUNED = (Variant(PLAIN, PLAIN, None), Variant(DENSE, OURS, DENSE))


def variants(keeps: Sequence[float]) -> tuple[Variant, ...]:
    """Return plain vLLM, this service dense, and pruned to each rate."""
    return (*UNPRUNED, *(Variant(f"keep {keep:g}", OURS, keep) for keep in keeps))


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """One answer of a run."""

    prompt_tokens: int
    variant: str
    stream: Stream
    others: float = 0.0  # cores that other programs took meanwhile

    @property
    def ttft_s(self) -> float:
        """Time to first token as the client saw it. Raises RuntimeError without one."""
        if self.stream.ending is not RequestEnding.ANSWERED or self.stream.ttft_s is None:
            raise RuntimeError(f"{self.variant}: {self.stream.ending}: {self.stream.error}")
        return self.stream.ttft_s

    @property
    def itl_s(self) -> float | None:
        """The median gap between tokens after the second, which pays for the hand-over.

        None where the answer came in too few pieces.
        """
        gaps = [later - sooner for sooner, later in pairwise(self.stream.arrivals_s[1:])]
        return statistics.median(gaps) if gaps else None


class Client:
    """Asks the servers over HTTP, each question once."""

    def __init__(
        self, tokenizer: ChatTokenizer, servers: Mapping[str, RunningServer], seed: int
    ) -> None:
        self._tokenizer = tokenizer
        self._callers = {
            name: HttpCaller(server.url, server.model, None) for name, server in servers.items()
        }
        self._roots = [server.pid for server in servers.values()]
        self._next_seed = seed * 1_000_003

    @asynccontextmanager
    async def open(self) -> AsyncIterator[Self]:
        """Hold the connections while inside."""
        async with AsyncExitStack() as stack:
            for caller in self._callers.values():
                await stack.enter_async_context(caller.open())
            yield self

    async def wait_idle(self) -> None:
        """Wait until no server has anything left to do for earlier requests."""
        await server_processes.wait_idle(self._roots)

    def needle(self, prompt_tokens: int) -> NeedlePrompt:
        """Return the next prompt: no two have more than the template in common."""
        self._next_seed += 1
        return needle_prompt(self._next_seed, prompt_tokens, self._tokenizer)

    async def ask(
        self, variant: Variant, needle: NeedlePrompt, output_tokens: int, *, ignore_eos: bool
    ) -> Stream:
        """Answer with at most `output_tokens` tokens; with exactly that many if `ignore_eos`."""
        prompt = LoadPrompt(
            messages=tuple(needle.messages),
            family="needles",
            variant=variant.name,
            keep=variant.keep,
            max_tokens=output_tokens,
            score=lambda text: float(needle.answer in text),
            ignore_eos=ignore_eos,
        )
        return await stream(prompt, self._callers[variant.server], TIMEOUT_S)


async def measure(
    client: Client,
    lengths: Sequence[int],
    variants: Sequence[Variant],
    repeats: int,
    output_tokens: int,
) -> list[TimedAnswer]:
    """Ask every length and variant `repeats` times, in turns.

    No prompt is asked twice: what a cache or the speculator remembers would be no measurement.
    An answer that other programs disturbed is asked for again, and the quietest of them counts.
    """
    asked: list[TimedAnswer] = []
    warm_up = min(*lengths, WARM_UP_TOKENS)
    for variant in variants:
        await client.ask(variant, client.needle(warm_up), output_tokens, ignore_eos=True)
    for repeat in range(repeats):
        for tokens in lengths:
            for variant in variants:
                one = await _ask_quietly(client, variant, tokens, output_tokens)
                asked.append(one)
                print(f"run {repeat + 1} of {repeats}: {tokens} tokens, {variant.name}: "
                      f"{one.ttft_s:.3f} s, others {one.others:.2f} cores", flush=True)  # fmt: skip
    return asked


async def _ask_quietly(
    client: Client, variant: Variant, tokens: int, output_tokens: int
) -> TimedAnswer:
    """Ask until other programs leave the cores to the servers, a few times at most."""
    tries: list[TimedAnswer] = []
    while len(tries) < TRIES:
        needle = client.needle(tokens)
        await client.wait_idle()
        watch = processes.Watch()
        watch.look()
        got = await client.ask(variant, needle, output_tokens, ignore_eos=True)
        watch.look()
        tries.append(TimedAnswer(tokens, variant.name, got, watch.mean_others()))
        if tries[-1].others <= QUIET_CORES:
            break
    return min(tries, key=lambda one: one.others)


async def scores(client: Client, variants: Sequence[Variant], items: int) -> dict[str, float]:
    """Return the share of needle questions answered right, by variant."""
    right = dict.fromkeys((variant.name for variant in variants), 0)
    for _ in range(items):
        needle = client.needle(SCORE_TOKENS)
        for variant in variants:
            got = await client.ask(variant, needle, ANSWER_TOKENS, ignore_eos=False)
            right[variant.name] += needle.answer in got.text
    return {name: count / items for name, count in right.items()}


def rows(asked: Sequence[TimedAnswer], scores: dict[str, float]) -> list[dict[str, Any]]:
    """Return medians of every cell, beside plain vLLM's and beside the ceiling.

    The ceiling is `1 / (k + r)` (section 4.3 of the paper) with the measured k = kept / N and r =
    the speculator's seconds / plain vLLM's time to first token. Overhead is what is neither
    speculator nor prefill, as a share of plain vLLM's time to first token.
    """
    cells: dict[tuple[int, str], list[TimedAnswer]] = {}
    for one in asked:
        cells.setdefault((one.prompt_tokens, one.variant), []).append(one)
    found = []
    for (tokens, variant), members in cells.items():
        plain_s = statistics.median(one.ttft_s for one in cells[tokens, PLAIN])
        found.append(_row(tokens, variant, members, plain_s) | {"score": scores.get(variant)})
    return found


def _row(
    tokens: int, variant: str, members: Sequence[TimedAnswer], plain_s: float
) -> dict[str, Any]:
    ttft_s = statistics.median(one.ttft_s for one in members)
    itl_s = [one.itl_s for one in members if one.itl_s is not None]
    row: dict[str, Any] = {
        "prompt_tokens": tokens,
        "variant": variant,
        "runs": len(members),
        "ttft_s": ttft_s,
        "others_cores": statistics.median(one.others for one in members),
        "speed_up": plain_s / ttft_s,
        "itl_s": statistics.median(itl_s) if itl_s else None,
    }
    reports = [one.stream.report for one in members if one.stream.report is not None]
    if not reports:
        return row
    compute_s = statistics.median(r["speculate_s"] + r["prefill_s"] for r in reports)
    kept = statistics.median(r["keep_rate"] for r in reports)
    ratio = statistics.median(r["speculate_s"] for r in reports) / plain_s
    ceiling = 1.0 / (kept + ratio)
    return row | {
        "kept_tokens": int(statistics.median(r["kept_tokens"] for r in reports)),
        "k": kept,
        "r": ratio,
        "ceiling": ceiling,
        "of_ceiling": row["speed_up"] / ceiling,
        "overhead": (ttft_s - compute_s) / plain_s,
    }


HEADERS = (
    "prompt", "variant", "kept", "TTFT", "vs vllm serve", "r", "ceiling 1/(k+r)", "of ceiling",
    "overhead", "ITL", "score", "paper, 405B",
)  # fmt: skip


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return one line per length and variant."""
    return markdown(HEADERS, [_cells(row) for row in found])


def _cells(row: dict[str, Any]) -> list[str]:
    papers = {f"keep {keep:g}": speed for keep, speed in PAPER.items()}
    measured = "ceiling" in row
    pruned = measured and row["k"] < 1.0
    return [
        str(row["prompt_tokens"]),
        row["variant"],
        str(row["kept_tokens"]) if measured else str(row["prompt_tokens"]),
        f"{row['ttft_s'] * 1e3:.0f} ms",
        f"{row['speed_up']:.2f}x",
        f"{row['r']:.3f}" if pruned else "-",
        f"{row['ceiling']:.2f}x" if pruned else "-",
        f"{row['of_ceiling']:.2f}" if pruned else "-",
        f"{row['overhead']:.1%}" if measured else "-",
        "-" if row["itl_s"] is None else f"{row['itl_s'] * 1e3:.1f} ms",
        "-" if row["score"] is None else f"{row['score']:.0%}",
        papers.get(row["variant"], "-"),
    ]


def serve_config(
    folder: Path, max_tokens: int, draft: Shape = SPECULATOR, main: Shape = MAIN
) -> AppConfig:
    """Write both random models below `folder`; nothing is cached between requests."""
    tokenizer = Path(local_path("models/demo-main"))
    write_model(folder / "bench-main", main, tokenizer, max_tokens)
    write_model(folder / "bench-speculator", draft, tokenizer, max_tokens)
    config = configuration(folder / "bench-main", folder / "bench-speculator", max_tokens)
    named = config.model.model_copy(update={"name": MODEL})
    return config.model_copy(update={"model": named})


async def speeds(
    args: argparse.Namespace, servers: Mapping[str, RunningServer]
) -> list[TimedAnswer]:
    """Measure long prompts in every variant, then short ones dense."""
    async with Client(load_tokenizer(), servers, args.seed).open() as client:
        asked = await measure(
            client, args.lengths, variants(args.keeps), args.repeats, OUTPUT_TOKENS
        )
        if not args.short_lengths:
            return asked
        return asked + await measure(
            client, args.short_lengths, UNPRUNED, args.repeats, SHORT_OUTPUT_TOKENS
        )


def memory(plain: RunningServer, mine: RunningServer) -> dict[str, int]:
    """Return resident bytes of plain vLLM, and of each pool, when all have been at work."""
    running = server_processes.processes()
    return {
        **server_processes.resident_by_pool(running, plain.pid, PLAIN),
        **server_processes.resident_by_pool(running, mine.pid, "Ray"),
    }


def memory_table(resident: Mapping[str, int], config: AppConfig) -> str:
    """Return the memory of each pool, and its part set aside for keys and values."""
    caches = {
        PLAIN: config.prefill.kv_cache_memory_bytes,
        "Prefill": config.prefill.kv_cache_memory_bytes,
        "Decode": config.decode.kv_cache_memory_bytes,
        "Speculator": config.speculator.kv_memory_bytes,
    }
    rows = [[pool, _mib(taken), _mib(caches.get(pool))] for pool, taken in resident.items()]
    return markdown(("pool", "resident", "KV set aside"), rows)


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / (1 << 20):.0f} MiB"


async def demo_scores(args: argparse.Namespace, served: RunningServer) -> dict[str, float]:
    """Return the demo pair's scores, whose dense answers stand for plain vLLM's, too."""
    pruned_or_not = [variant for variant in variants(args.keeps) if variant.server == OURS]
    async with Client(load_tokenizer(), {OURS: served}, args.seed).open() as client:
        found = await scores(client, pruned_or_not, args.items)
    return {**found, PLAIN: found[DENSE]}


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.versus", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--short-lengths", type=int, nargs="*", default=list(SHORT_LENGTHS))
    parser.add_argument("--keeps", type=float, nargs="*", default=list(KEEPS), help="keep rates")
    parser.add_argument(
        "--draft-layers", type=int, default=SPECULATOR.layers,
        help="layers of the speculator, which set its cost",
    )  # fmt: skip
    parser.add_argument("--repeats", type=int, default=5, help="runs of each variant")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    parser.add_argument("--items", type=int, default=25, help="questions of each score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-versus.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    folder = OUT.resolve() / "versus"
    folder.mkdir(parents=True, exist_ok=True)
    draft = replace(SPECULATOR, layers=args.draft_layers)
    as_shipped = draft == SPECULATOR and max(args.lengths) <= max(LENGTHS)
    allowed = MAX_FLOPS_SHARE if as_shipped else 1.0  # beyond, attention weighs more in the draft
    arithmetic = flops_lines(args.lengths, draft, allowed)
    print("\n".join(arithmetic), flush=True)
    config = serve_config(folder, max(args.lengths) + 128, draft)
    base = Path(local_path(BASE))
    with (
        run_plain_vllm(config, args.threads, folder / "vllm.log") as plain,
        run_ours(base, folder, config, args.threads) as mine,
    ):
        asked = asyncio.run(speeds(args, {PLAIN: plain, OURS: mine}))
        resident = memory(plain, mine)
    with run_ours(base, folder) as demo:
        answers = asyncio.run(demo_scores(args, demo))
    found = rows(asked, answers)
    print(f"\n{table(found)}\n\nmedian of {args.repeats} runs in turns; score: demo pair, "
          f"{args.items} needle questions of {SCORE_TOKENS} tokens")  # fmt: skip
    print(f"\n{memory_table(resident, config)}")
    results = {"arithmetic": arithmetic, "rows": found, "resident_bytes": resident}
    write_json(args.out, provenance(args.seed), results)
    print(f"written to {args.out}")
    return 0


def load_tokenizer() -> ChatTokenizer:
    """Load the tokenizer of the demo pair, which the random models share."""
    from transformers import AutoTokenizer

    tokenizer: ChatTokenizer = AutoTokenizer.from_pretrained(local_path("models/demo-main"))
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
