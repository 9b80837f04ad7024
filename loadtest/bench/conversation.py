"""Time to first token of every turn of a conversation: `make bench-conversation`.

Plain `vllm serve` with prefix caching, and this service dense, pruned with every turn selected
anew, and at its defaults. Both servers run at the same time and are asked in turns over HTTP. The
main model has random weights, since time does not depend on them; the speculator is the trained
one of the demo pair, since what it chooses decides what a turn can share.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from specprefill.config import AppConfig, local_path
from specprefill.lab.families.task import Message
from specprefill.lab.loadtest.http_stream import HttpCaller
from specprefill.lab.loadtest.outcome import RequestEnding, Stream
from specprefill.lab.loadtest.recorder import LoadPrompt
from specprefill.lab.loadtest.runner import stream
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.synthetic.needles import ChatTokenizer, needle_prompt

from . import server_processes
from .servers import RunningServer, run_ours, run_plain_vllm
from .ttft import MAIN, Shape
from .versus import BASE, OURS, OUT, PLAIN, TIMEOUT_S, load_tokenizer, serve_config

DRAFT = "models/demo-speculator"
DRAFT_SHAPE = Shape(hidden=128, intermediate=256, layers=4, heads=4, kv_heads=4, head_dim=32)
DOCUMENT_TOKENS, TURNS, GROWTHS, ANSWER_TOKENS = 8192, 6, (200, 1000), 32
KEEP = 0.3
ANEW_STEP = 1e-4  # another rate each turn: what was kept then does not serve
DEFAULT, DENSE, ANEW = "defaults", "dense", f"keep {KEEP:g}, anew each turn"
VARIANTS = (PLAIN, DENSE, ANEW, DEFAULT)


@dataclass(frozen=True, slots=True)
class TimedTurn:
    """One turn of a conversation, as its client saw it."""

    variant: str
    growth: int
    turn: int  # from 1
    stream: Stream

    @property
    def ttft_s(self) -> float:
        """Time to first token. Raises RuntimeError without one."""
        if self.stream.ending is not RequestEnding.ANSWERED or self.stream.ttft_s is None:
            raise RuntimeError(f"{self.variant}: {self.stream.ending}: {self.stream.error}")
        return self.stream.ttft_s

    def reported(self, name: str) -> float | None:
        """Return a number of the service's report; None from plain vLLM."""
        report = self.stream.report
        return None if report is None else float(report[name])


def questions(
    seed: int, growth: int, tokenizer: ChatTokenizer, document: int, turns: int
) -> Iterator[str]:
    """Yield the user's messages: a long document and a question, then more text and questions."""
    yield _content(needle_prompt(seed, document, tokenizer).messages)
    for turn in range(1, turns):
        more = needle_prompt(seed + turn, growth - ANSWER_TOKENS, tokenizer, system=None)
        yield _content(more.messages)


def keep_of(variant: str, turn: int) -> float | str | None:
    """Return the keep rate that a variant asks for."""
    rates = {PLAIN: None, DENSE: "dense", DEFAULT: None, ANEW: KEEP + turn * ANEW_STEP}
    return rates[variant]


async def converse(
    caller: HttpCaller, variant: str, growth: int, asked: Sequence[str], roots: Sequence[int]
) -> list[TimedTurn]:
    """Ask one question after the other, each with all answers so far."""
    messages: list[Message] = []
    found: list[TimedTurn] = []
    for turn, question in enumerate(asked, start=1):
        messages.append({"role": "user", "content": question})
        await server_processes.wait_idle(roots)
        prompt = LoadPrompt(
            messages=tuple(messages),
            family="conversation",
            variant=variant,
            keep=keep_of(variant, turn),
            max_tokens=ANSWER_TOKENS,
            score=lambda _: 0.0,
            ignore_eos=True,
        )
        found.append(TimedTurn(variant, growth, turn, await stream(prompt, caller, TIMEOUT_S)))
        print(
            f"{growth} tokens a turn, {variant}, turn {turn}: {found[-1].ttft_s:.3f} s", flush=True
        )
        messages.append({"role": "assistant", "content": found[-1].stream.text})
    return found


async def measure(
    args: argparse.Namespace, servers: Mapping[str, RunningServer]
) -> list[TimedTurn]:
    """Hold `args.repeats` conversations per variant and growth, each about another document."""
    tokenizer, rng = load_tokenizer(), random.Random(args.seed)
    roots = [server.pid for server in servers.values()]
    found: list[TimedTurn] = []
    async with AsyncExitStack() as stack:
        callers = {
            name: HttpCaller(server.url, server.model, None) for name, server in servers.items()
        }
        for caller in callers.values():
            await stack.enter_async_context(caller.open())
        for repeat in range(-1, args.repeats):  # the first one warms up
            growths = args.growths if repeat >= 0 else args.growths[:1]
            for growth in growths:
                for variant in VARIANTS:
                    document = args.document if repeat >= 0 else args.document // 4
                    seed = rng.randrange(1 << 30)
                    asked = list(questions(seed, growth, tokenizer, document, args.turns))
                    caller = callers[PLAIN if variant == PLAIN else OURS]
                    turns = await converse(caller, variant, growth, asked, roots)
                    found += turns if repeat >= 0 else []
    return found


def rows(found: Sequence[TimedTurn]) -> list[dict[str, Any]]:
    """Return medians per growth, variant and turn, beside plain vLLM's of the same turn."""
    cells: dict[tuple[int, str, int], list[TimedTurn]] = {}
    for each in found:
        cells.setdefault((each.growth, each.variant, each.turn), []).append(each)
    seconds = {
        cell: statistics.median(m.ttft_s for m in members) for cell, members in cells.items()
    }
    return [
        {
            "growth": growth,
            "variant": variant,
            "turn": turn,
            "ttft_s": seconds[growth, variant, turn],
            "of_plain": seconds[growth, variant, turn] / seconds[growth, PLAIN, turn],
            "kept_tokens": _median(members, "kept_tokens"),
            "carried_tokens": _median(members, "carried_tokens"),
            "reasons": sorted({str(m.stream.report["reason"]) for m in members if m.stream.report}),
        }
        for (growth, variant, turn), members in cells.items()
    ]


def table(found: Sequence[dict[str, Any]]) -> str:
    """Return one line per growth and variant: seconds of each turn, and of all of them."""
    lines: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in found:
        lines.setdefault((row["growth"], row["variant"]), []).append(row)
    turns = max(row["turn"] for row in found)
    headers = ("new tokens", "variant", *(f"turn {turn + 1}" for turn in range(turns)), "sum")
    cells = [
        [
            str(growth),
            variant,
            *(f"{row['ttft_s']:.2f} s ({row['of_plain']:.2f}x)" for row in members),
            f"{sum(row['ttft_s'] for row in members):.1f} s",
        ]
        for (growth, variant), members in lines.items()
    ]
    return markdown(headers, cells)


def conversation_config(folder: Path, max_tokens: int, layers: int) -> AppConfig:
    """Configure the random main model and the trained draft, with prefix caches."""
    config = serve_config(folder, max_tokens, main=replace(MAIN, layers=layers))
    caching = {"enable_prefix_caching": True}
    return config.model_copy(
        update={
            "speculator": config.speculator.model_copy(
                update={"path": local_path(DRAFT), "random_weights": False}
            ),
            "prefill": config.prefill.model_copy(update=caching),
            "decode": config.decode.model_copy(update=caching),
        }
    )


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.conversation", description=__doc__
    )
    parser.add_argument("--document", type=int, default=DOCUMENT_TOKENS, help="tokens of turn 1")
    parser.add_argument("--turns", type=int, default=TURNS)
    parser.add_argument(
        "--growths", type=int, nargs="+", default=list(GROWTHS), help="tokens a turn"
    )
    parser.add_argument("--layers", type=int, default=12, help="layers of the main model")
    parser.add_argument("--repeats", type=int, default=1, help="conversations of each variant")
    parser.add_argument("--threads", type=int, default=1, help="threads of each engine")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-conversation.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    folder = OUT.resolve() / "conversation"
    folder.mkdir(parents=True, exist_ok=True)
    longest = args.document + args.turns * (max(args.growths) + 64)
    share = DRAFT_SHAPE.prefill_flops(args.document) / replace(
        MAIN, layers=args.layers
    ).prefill_flops(args.document)
    print(f"the speculator has {share:.1%} of the main model's FLOPs at {args.document} tokens")
    config = conversation_config(folder, longest, args.layers)
    base = Path(local_path(BASE))
    with (
        run_plain_vllm(config, args.threads, folder / "vllm.log") as plain,
        run_ours(base, folder, config, args.threads) as mine,
    ):
        found = rows(asyncio.run(measure(args, {PLAIN: plain, OURS: mine})))
    print(f"\n{table(found)}\n\nin parentheses: times plain vLLM's seconds of the same turn")
    write_json(args.out, provenance(args.seed), {"flops_share": share, "rows": found})
    print(f"written to {args.out}")
    return 0


def _median(members: Sequence[TimedTurn], name: str) -> float | None:
    values = [value for each in members if (value := each.reported(name)) is not None]
    return statistics.median(values) if values else None


def _content(messages: Sequence[Mapping[str, str]]) -> str:
    return messages[-1]["content"]


if __name__ == "__main__":
    sys.exit(main())
