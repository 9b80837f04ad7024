"""Several clients at once, beside plain `vllm serve`: `make bench-concurrency`.

Each of N clients asks its next question when its last one is answered. Both servers have the same
main model and may use the same cores: plain vLLM's engine with a thread for each, this service with
a prefill replica of one thread for each. They are asked one after the other, at each N. Weights are
random; the score is the demo pair's, see `versus`.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specprefill.config import AppConfig, local_path
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from .servers import RunningServer, cores_option, run_ours, run_plain_vllm
from .ttft import flops_lines
from .versus import (
    BASE,
    OURS,
    OUT,
    PLAIN,
    SCORE_TOKENS,
    Client,
    TimedAnswer,
    Variant,
    demo_scores,
    load_tokenizer,
    serve_config,
    variants,
)

CLIENTS = (1, 2, 4, 8)
KEEPS = (0.1,)
PROMPT_TOKENS = 2048
OUTPUT_TOKENS = 16
ROUNDS = 3  # questions of each client


@dataclass(frozen=True, slots=True)
class ClientGroup:
    """All answers of some clients of one server, and how long they took together."""

    clients: int
    variant: str
    answers: Sequence[TimedAnswer]
    took_s: float

    def row(self, score: float | None) -> dict[str, Any]:
        """Return the answers as numbers."""
        gaps = [one.itl_s for one in self.answers if one.itl_s is not None]
        return {
            "clients": self.clients,
            "variant": self.variant,
            "answers": len(self.answers),
            "qps": len(self.answers) / self.took_s,
            "ttft_s": statistics.median(one.ttft_s for one in self.answers),
            "itl_s": statistics.median(gaps) if gaps else None,
            "score": score,
        }


async def ask_as_group(
    client: Client, variant: Variant, clients: int, args: argparse.Namespace
) -> ClientGroup:
    """Let `clients` clients ask `args.rounds` questions each."""

    async def asks() -> list[TimedAnswer]:
        answers = []
        for _ in range(args.rounds):
            needle = client.needle(args.prompt_tokens)
            got = await client.ask(variant, needle, OUTPUT_TOKENS, ignore_eos=True)
            answers.append(TimedAnswer(args.prompt_tokens, variant.name, got))
        return answers

    await client.wait_idle()
    started_s = time.monotonic()
    answers = await asyncio.gather(*(asks() for _ in range(clients)))
    took_s = time.monotonic() - started_s
    return ClientGroup(clients, variant.name, [one for some in answers for one in some], took_s)


async def ask_as_groups(
    args: argparse.Namespace, servers: Mapping[str, RunningServer]
) -> list[ClientGroup]:
    """Run every number of clients, in every variant, after one question that warms up."""
    async with Client(load_tokenizer(), servers, args.seed).open() as client:
        asked = variants(args.keeps)
        for variant in asked:
            await client.ask(variant, client.needle(128), 1, ignore_eos=True)
        found = []
        for clients in args.clients:
            for variant in asked:
                found.append(await ask_as_group(client, variant, clients, args))
                row = found[-1].row(None)
                print(f"{clients} clients, {variant.name}: {row['qps']:.2f}/s", flush=True)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return one line per number of clients and variant, beside plain vLLM's."""
    plain = {row["clients"]: row for row in rows if row["variant"] == PLAIN}
    headers = ("clients", "variant", "answers/s", "vs vllm serve", "TTFT", "vs vllm serve", "ITL",
               "score")  # fmt: skip
    return markdown(headers, [_cells(row, plain[row["clients"]]) for row in rows])


def _cells(row: dict[str, Any], plain: dict[str, Any]) -> list[str]:
    return [
        str(row["clients"]),
        row["variant"],
        f"{row['qps']:.2f}",
        f"{row['qps'] / plain['qps']:.2f}x",
        f"{row['ttft_s'] * 1e3:.0f} ms",
        f"{plain['ttft_s'] / row['ttft_s']:.2f}x",
        "-" if row["itl_s"] is None else f"{row['itl_s'] * 1e3:.1f} ms",
        "-" if row["score"] is None else f"{row['score']:.0%}",
    ]


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.concurrency", description=__doc__
    )
    parser.add_argument("--clients", type=int, nargs="+", default=list(CLIENTS))
    parser.add_argument("--keeps", type=float, nargs="*", default=list(KEEPS), help="keep rates")
    parser.add_argument("--prompt-tokens", type=int, default=PROMPT_TOKENS)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="questions of each client")
    cores_option(parser)
    parser.add_argument("--items", type=int, default=10, help="questions of each score")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-concurrency.json")
    return parser.parse_args(argv)


def _for_all(config: AppConfig, clients: int) -> AppConfig:
    """Return engines whose batch has room for every client."""
    seats = {"max_num_seqs": clients}
    return config.model_copy(
        update={
            "prefill": config.prefill.model_copy(update=seats),
            "decode": config.decode.model_copy(update=seats),
        }
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    folder = OUT.resolve() / "concurrency"
    folder.mkdir(parents=True, exist_ok=True)
    arithmetic = flops_lines([args.prompt_tokens])
    config = _for_all(serve_config(folder, args.prompt_tokens + 128), max(args.clients))
    base = Path(local_path(BASE))
    with (
        run_plain_vllm(config, args.cores, folder / "vllm.log") as plain,
        run_ours(base, folder, config, prefill_replicas=args.cores) as mine,
    ):
        found = asyncio.run(ask_as_groups(args, {PLAIN: plain, OURS: mine}))
    with run_ours(base, folder) as demo:
        scores = asyncio.run(demo_scores(args, demo))
    rows = [one.row(scores.get(one.variant)) for one in found]
    print(f"\n{table(rows)}\n\nprompts of {args.prompt_tokens} tokens, answers of {OUTPUT_TOKENS}; "
          f"score: demo pair, {args.items} needle questions of {SCORE_TOKENS} tokens")  # fmt: skip
    write_json(args.out, provenance(args.seed), {"arithmetic": arithmetic, "rows": rows})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
