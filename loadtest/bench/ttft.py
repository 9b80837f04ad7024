"""Time to first token, dense and pruned, by stage: `make bench-ttft`.

Time does not depend on the weights, so both models are random; the main one is large enough
for its prefill to dominate, the speculator costs at most 3 % of its FLOPs. Runs of all
variants are interleaved, so that a slow minute of the machine hits every variant.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from specprefill.config import AppConfig, local_path
from specprefill.core.types import Controls, PlanKind, Report, Request
from specprefill.lab.reporting.tables import markdown, provenance, write_json

if TYPE_CHECKING:
    from specprefill.core.ports import Answerer

OUT = Path("out")
LENGTHS = (1024, 4096, 8192)
KEEPS = (None, 0.3, 0.1)  # None: dense
STAGES = ("queue_s", "speculate_s", "prefill_s")  # the time to first token, stage by stage
MAX_FLOPS_SHARE = 0.03
OUTPUT_TOKENS = 4
FIRST_TOKEN_ID = 16  # below are the special ones


@dataclass(frozen=True, slots=True)
class Shape:
    """A Llama's size."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def matrix_parameters(self) -> int:
        """Number of parameters that multiply every token (no embeddings, no output head)."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.intermediate)

    def prefill_flops(self, tokens: int) -> float:
        """Return 2 per parameter and token, and causal attention: 2 n^2 per head dimension."""
        attention = 2.0 * tokens**2 * self.heads * self.head_dim * self.layers
        return 2.0 * self.matrix_parameters() * tokens + attention


MAIN = Shape(hidden=768, intermediate=2304, layers=6, heads=12, kv_heads=4, head_dim=64)
SPECULATOR = Shape(hidden=96, intermediate=256, layers=2, heads=3, kv_heads=3, head_dim=32)


@dataclass(frozen=True, slots=True)
class TtftRun:
    """One request's report, and its parameters."""

    prompt_tokens: int
    keep: float | None
    report: Report


def write_model(folder: Path, shape: Shape, tokenizer: Path, max_tokens: int) -> None:
    """Write a model folder without weights: a config and the shipped tokenizer."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tokenizer / name, folder / name)
    config = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))
    config |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": max_tokens,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def configuration(main: Path, speculator: Path, max_tokens: int) -> AppConfig:
    """Configure both models on CPUs, one core each, with nothing cached between runs."""
    engine = {
        "block_size": 128,
        "kv_cache_memory_bytes": 512 << 20,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 2048,
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "cpu_threads": 1,
    }
    return AppConfig.model_validate(
        {
            "model": {
                "path": str(main),
                "dtype": "float32",
                "load_format": "dummy",
                "max_model_len": max_tokens,
            },
            "speculator": {
                "path": str(speculator),
                "dtype": "float32",
                "device": "cpu",
                "random_weights": True,
                "timeout_s": 300,
            },
            "selection": {"min_kept_tokens": 32, "tail_tokens": 32},
            "prefill": engine,
            "decode": engine,
            "kv": {"host": "127.0.0.1", "max_held_bytes": 1 << 30, "lease_s": 300},
        }
    )


def prepare(max_tokens: int) -> tuple[AppConfig, int]:
    """Write both models; return their configuration, and the size of their vocabulary."""
    folder = OUT.resolve() / "models"
    tokenizer = Path(local_path("models/demo-main"))
    write_model(folder / "bench-main", MAIN, tokenizer, max_tokens)
    write_model(folder / "bench-speculator", SPECULATOR, tokenizer, max_tokens)
    config = configuration(folder / "bench-main", folder / "bench-speculator", max_tokens)
    vocabulary = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    return config, vocabulary


def request(
    prompt_tokens: int,
    keep: float | None,
    vocabulary: int,
    rng: random.Random,
    output_tokens: int = OUTPUT_TOKENS,
) -> Request:
    """Make a prompt of random tokens, so that no two have a prefix in common."""
    from vllm.sampling_params import SamplingParams

    sampling = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True)
    return Request(
        request_id=f"{prompt_tokens}-{keep}-{rng.getrandbits(48):x}",
        prompt=tuple(rng.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(prompt_tokens)),
        sampling=msgspec.msgpack.encode(sampling),
        controls=Controls(prune=False) if keep is None else Controls(keep=keep),
        timeout_s=600.0,
    )


async def answer(pipeline: Answerer, asked: Request) -> Report:
    """Run one request to its end."""
    report = None
    async for chunk in pipeline.generate(asked):
        report = chunk.report or report
    if report is None:
        raise RuntimeError("the answer has no report")
    return report


async def measure(
    config: AppConfig, lengths: Sequence[int], repeats: int, vocabulary: int, seed: int
) -> list[TtftRun]:
    """Run every variant `repeats` times, interleaved, after one warm-up each."""
    from .pools import local_pipeline

    rng = random.Random(seed)
    runs: list[TtftRun] = []
    async with local_pipeline(config) as pipeline:
        for keep in KEEPS:
            await answer(pipeline, request(min(lengths), keep, vocabulary, rng))
        for repeat in range(repeats):
            for tokens in lengths:
                for keep in KEEPS:
                    report = await answer(pipeline, request(tokens, keep, vocabulary, rng))
                    runs.append(TtftRun(tokens, keep, report))
                    print(f"run {repeat + 1} of {repeats}: {_progress(runs[-1])}", flush=True)
    return runs


def _progress(run: TtftRun) -> str:
    return f"{run.prompt_tokens} tokens, {_name(run.keep)}: {run.report.ttft_s:.3f} s"


def _name(keep: float | None) -> str:
    return "dense" if keep is None else f"keep {keep:g}"


def summary(runs: Sequence[TtftRun]) -> list[dict[str, Any]]:
    """Return the medians of every variant."""
    variants = sorted(
        {(run.prompt_tokens, run.keep) for run in runs},
        key=lambda variant: (variant[0], -(variant[1] or 1.0)),
    )
    return [_medians([run for run in runs if (run.prompt_tokens, run.keep) == v]) for v in variants]


def _medians(runs: Sequence[TtftRun]) -> dict[str, Any]:
    reports = [asdict(run.report) for run in runs]
    times = ("ttft_s", *STAGES, "transfer_s", "first_decode_s")
    return {
        "prompt_tokens": runs[0].prompt_tokens,
        "variant": _name(runs[0].keep),
        "kept_tokens": int(statistics.median(report["kept_tokens"] for report in reports)),
        "runs": len(runs),
        **{name: statistics.median(report[name] for report in reports) for name in times},
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return median times, the speed-up over dense, and each stage's share of the first token."""
    headers = ("prompt", "variant", "kept", "TTFT", "vs dense", "queue", "speculate", "prefill",
               "rest", "transfer", "first decode")  # fmt: skip
    dense = {row["prompt_tokens"]: row["ttft_s"] for row in rows if row["variant"] == "dense"}
    return markdown(headers, [_cells(row, dense[row["prompt_tokens"]]) for row in rows])


def _cells(row: dict[str, Any], dense_s: float) -> list[str]:
    ttft_s = row["ttft_s"]
    staged_s = sum(row[name] for name in STAGES)
    shares = [row[name] / ttft_s for name in STAGES] + [max(0.0, ttft_s - staged_s) / ttft_s]
    return [
        str(row["prompt_tokens"]),
        row["variant"],
        str(row["kept_tokens"]),
        f"{ttft_s:.3f} s",
        f"{dense_s / ttft_s:.2f}x",
        *(f"{share:.1%}" for share in shares),
        f"{row['transfer_s'] * 1e3:.0f} ms",
        f"{row['first_decode_s'] * 1e3:.0f} ms",
    ]


def flops_lines(
    lengths: Sequence[int], draft: Shape = SPECULATOR, max_share: float = MAX_FLOPS_SHARE
) -> list[str]:
    """Return the arithmetic of both models. Raises ValueError beyond the allowed share."""
    lines = [
        f"main: {MAIN.matrix_parameters() / 1e6:.1f}M matrix parameters, {asdict(MAIN)}",
        f"speculator: {draft.matrix_parameters() / 1e6:.2f}M, {asdict(draft)}",
        "prefill FLOPs = 2 x parameters x n + 2 x n^2 x heads x head_dim x layers",
    ]
    for tokens in lengths:
        main, speculator = MAIN.prefill_flops(tokens), draft.prefill_flops(tokens)
        share = speculator / main
        if share > max_share:
            raise ValueError(f"speculator: {share:.1%} of the main model's FLOPs at {tokens}")
        lines.append(
            f"n = {tokens}: main {main / 1e9:.0f} GFLOP, speculator {speculator / 1e9:.1f} GFLOP"
            f" = {share:.2%}"
        )
    return lines


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.ttft", description=__doc__)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each variant")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="prompt lengths in tokens"
    )
    parser.add_argument("--out", type=Path, default=OUT / "bench-ttft.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    from .pools import set_cpu_environment

    set_cpu_environment()
    arithmetic = flops_lines(args.lengths)
    print("\n".join(arithmetic), flush=True)
    config, vocabulary = prepare(max(args.lengths) + 64)
    runs = asyncio.run(measure(config, args.lengths, args.repeats, vocabulary, args.seed))
    rows = summary(runs)
    print(f"\n{table(rows)}\n\nmedian of {args.repeats} interleaved runs; {_count_pruned(runs)}")
    write_json(args.out, provenance(args.seed), {"arithmetic": arithmetic, "rows": rows})
    print(f"written to {args.out}")
    return 0


def _count_pruned(runs: Sequence[TtftRun]) -> str:
    """Return the number of prompts really pruned: an unplanned dense run would spoil medians."""
    asked = [run for run in runs if run.keep is not None]
    pruned = sum(run.report.plan is PlanKind.PRUNE for run in asked)
    return f"{pruned} of {len(asked)} prompts asked to be pruned were"


if __name__ == "__main__":
    sys.exit(main())
