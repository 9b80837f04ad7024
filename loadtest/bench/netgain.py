"""Pruning only when it pays, beside pruning always and never: `make bench-netgain`.

One trace of short, long, cached and uncached prompts, asked three times over: every request pruned,
none, and as the cost model decides. The cost model knows no more than a deployment does: a probe
at start-up, and the reports of its own requests. The three ways take turns, request by request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from specprefill.config import AppConfig, local_path
from specprefill.control.from_config import net_gain
from specprefill.core.types import Controls, PlanKind, Reason, Report, Request, Span
from specprefill.lab.reporting.tables import markdown, provenance, write_json

from .ttft import FIRST_TOKEN_ID, MAIN, OUT, SPECULATOR, answer, configuration, write_model

KEEP = 0.2
WAYS = {
    "always": Controls(keep=KEEP),
    "never": Controls(prune=False),
    "net gain": Controls(),
}
MAX_TOKENS = 8192
ROUNDS = 4
QUESTION_TOKENS = 64


@dataclass(frozen=True, slots=True)
class RequestKind:
    """One sort of request in the trace."""

    name: str
    shared_tokens: int  # the same in every request of this sort
    own_tokens: int
    protected: bool = False  # the shared part is a system prompt: no plan may drop it
    warmed: bool = False  # the shared part is in the prefix cache before


KINDS = (
    RequestKind("short", 0, 256),
    RequestKind("medium", 0, 1024),
    RequestKind("long", 0, 4096),
    RequestKind("longest", 0, 7680),
    RequestKind("long system prompt", 3072, 256, protected=True),
    RequestKind("known document", 4096, QUESTION_TOKENS, warmed=True),
)


@dataclass(frozen=True, slots=True)
class NetGainRun:
    """One request's report, in one of the three ways."""

    kind: str
    way: str
    report: Report


def trace(rounds: int, rng: random.Random) -> list[RequestKind]:
    """Return every kind `rounds` times, shuffled."""
    kinds = list(KINDS) * rounds
    rng.shuffle(kinds)
    return kinds


class RequestMaker:
    """Requests of random tokens. Each way has shared parts of its own, hence caches of its own."""

    def __init__(self, vocabulary: int, rng: random.Random) -> None:
        from vllm.sampling_params import SamplingParams

        self._vocabulary = vocabulary
        self._rng = rng
        self._sampling = msgspec.msgpack.encode(
            SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        )
        self._shared: dict[tuple[str, str], tuple[int, ...]] = {}

    def request(self, kind: RequestKind, way: str) -> Request:
        """Return the next request of its sort."""
        shared = self._shared.setdefault((kind.name, way), self._tokens(kind.shared_tokens))
        spans = (Span(0, len(shared)),) if kind.protected else ()
        return self._request(shared + self._tokens(kind.own_tokens), WAYS[way], spans)

    def warm_up(self, kind: RequestKind, way: str) -> Request:
        """Return a dense request that leaves the shared part in the prefix cache."""
        asked = self.request(kind, way)
        return replace(asked, controls=Controls(prune=False))

    def plain(self, tokens: int) -> Request:
        """Return a request for the probe."""
        return self._request(self._tokens(tokens), Controls(), ())

    def _request(
        self, prompt: tuple[int, ...], controls: Controls, protected: tuple[Span, ...]
    ) -> Request:
        name = f"netgain-{self._rng.getrandbits(48):x}"
        return Request(
            name, prompt, self._sampling, protected=protected, controls=controls, timeout_s=600.0
        )

    def _tokens(self, count: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(FIRST_TOKEN_ID, self._vocabulary) for _ in range(count))


async def measure(config: AppConfig, rounds: int, vocabulary: int, seed: int) -> list[NetGainRun]:
    """Run the whole trace in every way."""
    from specprefill.control.probe import Probe

    from .pools import local_pipeline

    rng = random.Random(seed)
    prompts, gain, runs = RequestMaker(vocabulary, rng), net_gain(config), []
    async with local_pipeline(config, gain) as pipeline:
        inner = pipeline.pipeline
        probe = Probe(inner.speculator, inner.prefiller, prompts.plain, MAX_TOKENS - 1, 0.5, 60.0)
        await probe.run(gain.models)

        async def ask(request: Request, way: str) -> Report:
            report = await answer(pipeline, request)
            if way == "net gain":
                gain.learn(request, report)
            return report

        for kind, way in _warmed_prefixes():
            await ask(prompts.warm_up(kind, way), way)
        for place, kind in enumerate(kinds := trace(rounds, rng)):
            for way in _rotate_ways(place):
                report = await ask(prompts.request(kind, way), way)
                runs.append(NetGainRun(kind.name, way, report))
            print(f"request {place + 1} of {len(kinds)}: {kind.name}", flush=True)
    return runs


def _rotate_ways(place: int) -> list[str]:
    """Rotate the ways, so that none always finds the machine as the last one left it."""
    ways = list(WAYS)
    first = place % len(ways)
    return ways[first:] + ways[:first]


def _warmed_prefixes() -> Iterator[tuple[RequestKind, str]]:
    return ((kind, way) for kind in KINDS if kind.warmed for way in WAYS)


def summary(runs: Sequence[NetGainRun]) -> list[dict[str, Any]]:
    """Return mean seconds to first token by sort of request and way; the last row is the trace."""
    names = [kind.name for kind in KINDS]
    rows = [_row(name, [run for run in runs if run.kind == name]) for name in names]
    return [*rows, _row("whole trace", runs)]


def _row(name: str, runs: Sequence[NetGainRun]) -> dict[str, Any]:
    ways = {way: [run.report for run in runs if run.way == way] for way in WAYS}
    decided = ways["net gain"]
    return {
        "kind": name,
        "requests": len(decided),
        "ttft_s": {way: statistics.fmean(each.ttft_s for each in ways[way]) for way in WAYS},
        "pruned": sum(report.plan is PlanKind.PRUNE for report in decided),
        "no_gain": sum(report.reason is Reason.NO_GAIN for report in decided),
        "misjudged": statistics.median(_misjudgement(report) for report in decided),
    }


def _misjudgement(report: Report) -> float:
    """Return the error of the expected time to first token, as a share of it."""
    if report.expected is None:
        return 0.0
    foreseen_s = report.expected.for_plan(report.plan)
    return abs(report.ttft_s - foreseen_s) / report.ttft_s


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the summary as Markdown."""
    headers = ("request", "count", *(f"TTFT {way}" for way in WAYS), "pruned", "misjudged by")
    cells = [
        [
            row["kind"],
            str(row["requests"]),
            *(f"{row['ttft_s'][way]:.3f} s" for way in WAYS),
            str(row["pruned"]),
            f"{row['misjudged']:.0%}",
        ]
        for row in rows
    ]
    return markdown(headers, cells)


def verdict(rows: Sequence[dict[str, Any]]) -> str:
    """Return the cost model's saving over the whole trace."""
    mean_s = rows[-1]["ttft_s"]
    saved = {way: 1 - mean_s["net gain"] / mean_s[way] for way in ("always", "never")}
    return (
        f"mean time to first token with net gain: {saved['always']:+.0%} saved over always "
        f"pruning, {saved['never']:+.0%} over never"
    )


def bench_config(main: Path, speculator: Path) -> AppConfig:
    """Return `bench-ttft`'s configuration with a prefix cache, and pruning at any length."""
    plain = configuration(main, speculator, MAX_TOKENS)
    cached = {"enable_prefix_caching": True, "kv_cache_memory_bytes": 1 << 30}
    return plain.model_copy(
        update={
            "prefill": plain.prefill.model_copy(update=cached),
            "selection": plain.selection.model_copy(update={"keep": KEEP, "min_prompt_tokens": 1}),
        }
    )


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.netgain", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="requests of each sort")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-netgain.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    args = options(argv)
    from .pools import set_cpu_environment

    set_cpu_environment()
    folder = OUT.resolve() / "models"
    tokenizer = Path(local_path("models/demo-main"))
    write_model(folder / "netgain-main", MAIN, tokenizer, MAX_TOKENS)
    write_model(folder / "netgain-speculator", SPECULATOR, tokenizer, MAX_TOKENS)
    config = bench_config(folder / "netgain-main", folder / "netgain-speculator")
    vocabulary = json.loads((tokenizer / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    runs = asyncio.run(measure(config, args.rounds, vocabulary, args.seed))
    rows = summary(runs)
    print(f"\n{table(rows)}\n\n{verdict(rows)}")
    write_json(args.out, provenance(args.seed), {"keep": KEEP, "rows": rows})
    print(f"written to {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
