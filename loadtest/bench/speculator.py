"""The speculator by itself, beside a plain forward pass of the same model: `make bench-speculator`.

Tokens per second alone and in batches of eight, the cost of a second question about a document
that was read before, how long short prompts wait behind a long one, and the memory that a thousand
different prompts take. Every measurement is interleaved with what it is compared with, so that a
slow minute of the machine hits both.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from transformers import PreTrainedModel

from specprefill.config import SelectionConfig, SpeculatorConfig, local_path
from specprefill.control.from_config import selection_policy
from specprefill.core.types import Plan, PlanKind, Reason, Request
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.speculator.jobs import Batching
from specprefill.speculator.scorer import Scorer, load_scorer
from specprefill.speculator.service import SpeculatorService

from .ttft import FIRST_TOKEN_ID, OUT, SPECULATOR, write_model

LENGTHS = (1024, 4096, 8192)
BATCHES = (1, 8)
POOL_TOKENS = 13
QUESTION_TOKENS = 64
MANY_PROMPTS_TOKENS = (16, 1024)  # from, to
MANY_PROMPTS_BUDGET_BYTES = 16 << 20
LONG_TOKENS, SHORT_TOKENS, SHORT_PROMPTS = 8192, 1024, (1, 8)
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
PATIENCE_S = 600.0
MB = 1 << 20

Prompt = tuple[int, ...]
Prompts = Callable[[int], Prompt]  # a new one of this many tokens


@dataclass(frozen=True, slots=True)
class Throughput:
    """Scoring against one forward pass over the same prompts; medians."""

    model: str
    batch: int
    tokens: int  # of each prompt
    score_s: float
    forward_s: float

    def cells(self) -> list[str]:
        """Return a table's row."""
        total = self.batch * self.tokens
        return [
            self.model,
            str(self.batch),
            str(self.tokens),
            f"{total / self.score_s:,.0f}",
            f"{total / self.forward_s:,.0f}",
            f"{self.forward_s / self.score_s:.2f}",
        ]


@dataclass(frozen=True, slots=True)
class SecondQuestion:
    """A document with a question, then with another; medians."""

    model: str
    document_tokens: int
    first_s: float
    second_s: float

    def cells(self) -> list[str]:
        """Return a table's row."""
        return [
            self.model,
            str(self.document_tokens),
            f"{self.first_s * 1e3:.1f} ms",
            f"{self.second_s * 1e3:.1f} ms",
            f"{self.second_s / self.first_s:.3f}",
        ]


@dataclass(frozen=True, slots=True)
class BehindLong:
    """Short prompts that come while a long one is being read, and without it; medians."""

    model: str
    prompts: int  # short ones, all at once
    alone_s: float  # until the last of them is answered
    behind_s: float
    long_alone_s: float
    long_s: float  # the long one, which lets them go first

    def cells(self) -> list[str]:
        """Return a table's row."""
        return [
            self.model,
            str(self.prompts),
            f"{self.alone_s * 1e3:.0f} ms",
            f"{self.behind_s * 1e3:.0f} ms",
            f"{self.behind_s / self.alone_s:.2f}",
            f"{self.long_s / self.long_alone_s:.2f}",
        ]


@dataclass(frozen=True, slots=True)
class MemoryUse:
    """Different prompts, one after the other, each remembered."""

    model: str
    prompts: int
    budget_bytes: int
    most_bytes: int  # KV held at any moment, of the prompt being scored and of those remembered
    grown_bytes: int  # of the whole process, over the second half of the prompts

    def cells(self) -> list[str]:
        """Return a table's row."""
        return [
            self.model,
            str(self.prompts),
            f"{self.budget_bytes / MB:.1f} MiB",
            f"{self.most_bytes / MB:.1f} MiB",
            f"{self.grown_bytes / MB:.1f} MiB",
        ]


def throughput(
    name: str, scorer: Scorer, plain: PreTrainedModel, batch: int, tokens: int, repeats: int,
    prompts: Prompts,
) -> Throughput:  # fmt: skip
    """Measure new prompts every time, after one warm-up."""
    ours, theirs = [], []
    for _ in range(repeats + 1):
        asked = [prompts(tokens) for _ in range(batch)]
        ours.append(time_action(partial(scorer.score, asked)))
        theirs.append(time_action(partial(forward, plain, asked)))
    return Throughput(
        name, batch, tokens, statistics.median(ours[1:]), statistics.median(theirs[1:])
    )


def second_question(
    name: str, scorer: Scorer, tokens: int, repeats: int, prompts: Prompts
) -> SecondQuestion:
    """Measure new documents every time, after one warm-up."""
    first: list[float] = []
    second: list[float] = []
    for _ in range(repeats + 1):
        document = prompts(tokens)
        for times in (first, second):
            times.append(answer_s(scorer, document + prompts(QUESTION_TOKENS)))
    return SecondQuestion(name, tokens, statistics.median(first[1:]), statistics.median(second[1:]))


def answer_s(scorer: Scorer, prompt: Prompt) -> float:
    """Return seconds until the scores are there; after that the prompt is remembered."""
    started_s = time.perf_counter()
    with scorer.open_readings([prompt]) as readings:
        scorer.read(readings)
        scorer.look_ahead(readings)
        scorer.rate(readings[0])
        took_s = time.perf_counter() - started_s
        scorer.remember(readings)
    return took_s


async def behind_long(
    name: str, scorer: Scorer, count: int, repeats: int, prompts: Prompts
) -> BehindLong:
    """Ask the service, once for a long prompt alone and short ones alone, then for both."""
    batching = Batching(score_cache_bytes=0, kept_memory_bytes=0)
    policy = selection_policy(SelectionConfig())
    times: list[tuple[float, float, float, float]] = []
    async with SpeculatorService(lambda: scorer, policy, batching) as service:

        async def ask(tokens: int) -> float:
            started_s = time.perf_counter()
            request = Request("bench", prompts(tokens), b"")
            await service.select(request, PLAN, PATIENCE_S)
            return time.perf_counter() - started_s

        async def ask_short() -> float:
            return max(await asyncio.gather(*(ask(SHORT_TOKENS) for _ in range(count))))

        for _ in range(repeats + 1):
            long_alone_s, alone_s = await ask(LONG_TOKENS), await ask_short()
            long = asyncio.create_task(ask(LONG_TOKENS))
            await asyncio.sleep(long_alone_s / 2)  # most of it is still to be read
            behind_s = await ask_short()
            times.append((alone_s, behind_s, long_alone_s, await long))
    medians = (statistics.median(column) for column in zip(*times[1:], strict=True))
    return BehindLong(name, count, *medians)


def memory(
    name: str, scorer: Scorer, count: int, rng: random.Random, prompts: Prompts
) -> MemoryUse:
    """Measure the memory that `count` prompts of many lengths leave behind."""
    most, half_way = 0, 0
    for index in range(count):
        if index == count // 2:
            half_way = resident_bytes()
        for held in held_bytes(scorer, prompts(rng.randint(*MANY_PROMPTS_TOKENS))):
            most = max(most, held)
    return MemoryUse(name, count, scorer.memory_bytes, most, resident_bytes() - half_way)


def held_bytes(scorer: Scorer, prompt: Prompt) -> Iterator[int]:
    """Return KV held before a prompt is read, and once it is remembered."""
    with scorer.open_readings([prompt]) as readings:
        in_use = readings[0].keys.nbytes + readings[0].values.nbytes
        yield in_use + scorer.prefix.bytes_held
        scorer.read(readings)
        scorer.look_ahead(readings)
        scorer.remember(readings)
        yield in_use + scorer.prefix.bytes_held


def forward(model: PreTrainedModel, prompts: Sequence[Prompt]) -> None:
    """Return transformers' way to read prompts of one length."""
    with torch.inference_mode():
        model(input_ids=torch.tensor(prompts), use_cache=False, logits_to_keep=1)


def time_action(action: Callable[[], object]) -> float:
    """Return the seconds that `action` takes."""
    started_s = time.perf_counter()
    action()
    return time.perf_counter() - started_s


def resident_bytes() -> int:
    """Return this process's resident memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096


def draft_models(max_tokens: int) -> dict[str, SpeculatorConfig]:
    """Return the demo's draft, and the shape that `make bench-ttft` runs."""
    folder = OUT.resolve() / "models" / "bench-speculator"
    write_model(folder, SPECULATOR, Path(local_path("models/demo-main")), max_tokens)
    common = {"dtype": "float32", "device": "cpu", "threads": 1}
    return {
        "demo": SpeculatorConfig(path="models/demo-speculator", **common),
        "bench": SpeculatorConfig(path=str(folder), random_weights=True, **common),
    }


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m loadtest.bench.speculator", description=__doc__
    )
    parser.add_argument("--repeats", type=int, default=5, help="runs of each measurement")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=list(LENGTHS), help="prompt lengths in tokens"
    )
    parser.add_argument(
        "--prompts", type=int, default=1000, help="prompts of the memory measurement"
    )
    parser.add_argument("--out", type=Path, default=OUT / "bench-speculator.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    rng = random.Random(args.seed)
    speeds: list[Throughput] = []
    questions: list[SecondQuestion] = []
    behind: list[BehindLong] = []
    memories: list[MemoryUse] = []
    for name, config in draft_models(max(args.lengths) + 256).items():
        scorer = load_scorer(config, POOL_TOKENS)
        plain = copy.deepcopy(scorer.draft.model)
        plain.set_attn_implementation("sdpa")
        prompts = random_prompts(rng, scorer.vocabulary_size)
        for tokens in args.lengths:
            print(f"{name}: {tokens} tokens", flush=True)
            speeds += [
                throughput(name, scorer, plain, batch, tokens, args.repeats, prompts)
                for batch in BATCHES
            ]
            questions.append(second_question(name, scorer, tokens, args.repeats, prompts))
        for count in SHORT_PROMPTS:
            one = behind_long(name, load_scorer(config, POOL_TOKENS), count, args.repeats, prompts)
            behind.append(asyncio.run(one))
        print(f"{name}: {args.prompts} prompts", flush=True)
        small = load_scorer(
            config.model_copy(update={"kv_memory_bytes": MANY_PROMPTS_BUDGET_BYTES}), POOL_TOKENS
        )
        memories.append(memory(name, small, args.prompts, rng, prompts))
    print("\n".join(("", *tables(speeds, questions, behind, memories))))
    results = {
        "throughput": [asdict(row) for row in speeds],
        "second_question": [asdict(row) for row in questions],
        "behind_long": [asdict(row) for row in behind],
        "memory": [asdict(row) for row in memories],
    }
    write_json(args.out, provenance(args.seed), results)
    print(f"\nmedians of {args.repeats} interleaved runs; written to {args.out}")
    return 0


def random_prompts(rng: random.Random, vocabulary: int) -> Prompts:
    """Make prompts of random tokens: no two start alike."""
    return lambda tokens: tuple(rng.randrange(FIRST_TOKEN_ID, vocabulary) for _ in range(tokens))


def tables(
    speeds: Sequence[Throughput],
    questions: Sequence[SecondQuestion],
    behind: Sequence[BehindLong],
    memories: Sequence[MemoryUse],
) -> list[str]:
    """Return one table for each of the four."""
    return [
        markdown(
            ["draft", "batch", "tokens", "scored tokens/s", "forward tokens/s", "scored / forward"],
            [row.cells() for row in speeds],
        ),
        "",
        markdown(
            ["draft", "document", "first question", "second question", "second / first"],
            [row.cells() for row in questions],
        ),
        "",
        markdown(
            ["draft", "short prompts", "alone", "behind a long one", "ratio", "the long one"],
            [row.cells() for row in behind],
        ),
        "",
        markdown(
            ["draft", "prompts", "KV budget", "most KV held", "process grew"],
            [row.cells() for row in memories],
        ),
    ]


if __name__ == "__main__":
    sys.exit(main())
