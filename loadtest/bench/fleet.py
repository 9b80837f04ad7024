"""What a fleet costs its control plane: `make bench-fleet`.

1. Choosing a replica for a prompt whose prefix every replica remembers, beside asking each
   replica's memory in turn.
2. The autoscaler's work at 10,000 arrivals a second counted by twenty gateways: taking in a
   reading, and deciding the sizes of pools of hundreds of replicas.

CPU time of one thread, the least of some runs.
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from specprefill.autoscaling.arrival_rates import Traffic
from specprefill.autoscaling.signals import Size, size
from specprefill.control.scaling.decide import decide
from specprefill.control.scaling.values import (
    Decision,
    Engines,
    Memory,
    Observation,
    Pool,
    PoolLimits,
    PoolState,
    ScalingPolicy,
    Slo,
)
from specprefill.control.stages import DEFAULT_CURVES
from specprefill.core.prefix_digests import BLOCK_TOKENS
from specprefill.gateway.pools.affinity import PrefillLoad, PrefixAffinity
from specprefill.lab.reporting.tables import markdown, provenance, write_json

OUT = Path("out") / "bench-fleet.json"
REPLICAS, SHARED_TOKENS = (10, 100, 1000), (8_000, 125_000)
RATES, GATEWAYS = (100, 1_000, 10_000), 20
READING_S, WINDOW_S = 0.5, 600.0
LENGTHS, KEEP, OUTPUT_TOKENS = (500, 128_000), 0.3, 256  # even on a logarithmic scale
DRAWN_SIZES = 64
SEED = 0


@dataclass(frozen=True, slots=True)
class Choice:
    """The cost of choosing one replica."""

    replicas: int
    shared_tokens: int
    choose_s: float
    record_s: float  # that a replica took the prompt
    each_memory_s: float  # asking every replica's memory instead


@dataclass(frozen=True, slots=True)
class Decisions:
    """The cost of autoscaling at one rate."""

    arrivals_per_s: int
    reading_s: float
    decide_s: float
    kept_bytes: int  # of the window's arrivals
    replicas: int  # that were decided, in all pools


def measure_choice(replicas: int, shared_tokens: int, runs: int) -> Choice:
    """Measure with a prefix that every replica remembers whole."""
    blocks = shared_tokens // BLOCK_TOKENS
    prompt = PrefillLoad(
        shared_tokens + 100, tuple(random.Random(SEED).sample(range(1 << 60), blocks))
    )
    affinity = PrefixAffinity()
    names = [str(number) for number in range(replicas)]
    affinity.set_replicas(dict.fromkeys(names, 2 * shared_tokens))
    for name in names:
        affinity.record_sent(name, name, prompt)
        affinity.record_end(name)
    memories = [replica.seen for replica in affinity._replicas.values()]

    def record() -> None:
        affinity.record_sent("call", names[-1], prompt)
        affinity.record_end("call")

    return Choice(
        replicas,
        shared_tokens,
        _least_s(lambda: affinity.choose("call", prompt), runs),
        _least_s(record, runs),
        _least_s(
            lambda: [memory.longest_match(prompt.prefix) for memory in memories], min(3, runs)
        ),
    )


def measure_decisions(arrivals_per_s: int, runs: int, window_s: float = WINDOW_S) -> Decisions:
    """Measure with a full window of arrivals."""
    rng = np.random.default_rng(SEED)
    traffic = Traffic(window_s)
    counts: list[Counter[Size]] = [Counter() for _ in range(GATEWAYS)]
    readings = int(window_s / READING_S)
    spent = []
    for reading in range(readings + 1):
        for count in counts:
            arrived = rng.poisson(arrivals_per_s * READING_S / GATEWAYS)
            count.update(_draw_sizes(rng, arrived))
        copies = {str(number): count.copy() for number, count in enumerate(counts)}
        started_s = time.thread_time()
        traffic.add_counts(reading * READING_S, copies)
        spent.append(time.thread_time() - started_s)
    limits = PoolLimits(1, 100_000, 1.0, 60.0, max_step=100_000)
    policy = ScalingPolicy(Slo(2.0), dict.fromkeys(Pool, limits), window_s=window_s)
    now_s = readings * READING_S
    pools = {pool: PoolState(300) for pool in Pool}

    def decision() -> Decision:
        seen = Observation(now_s, 0.0, traffic.arrivals(), pools, Engines(DEFAULT_CURVES))
        return decide(seen, policy, Memory())[0]

    return Decisions(
        arrivals_per_s,
        statistics.median(spent),
        _least_s(decision, runs),
        sum(each.sizes.nbytes + each.counts.nbytes for each in traffic._readings),
        sum(each.wanted for each in decision().pools.values()),
    )


def _draw_sizes(rng: np.random.Generator, count: int) -> dict[Size, int]:
    """Draw prompts of all lengths; return how many there are of each size."""
    low, high = LENGTHS
    edges = np.geomspace(low, high, DRAWN_SIZES)
    found: Counter[Size] = Counter()
    for tokens, drawn in zip(
        edges, rng.multinomial(count, [1 / DRAWN_SIZES] * DRAWN_SIZES), strict=True
    ):
        found[size(float(tokens), KEEP * float(tokens), OUTPUT_TOKENS)] += int(drawn)
    return found


def _least_s(step: Callable[[], object], runs: int) -> float:
    spent = []
    for _ in range(runs):
        started_s = time.thread_time()
        step()
        spent.append(time.thread_time() - started_s)
    return min(spent)


def choice_table(found: Sequence[Choice]) -> str:
    """Return one line per size of the fleet and of the prefix."""
    return markdown(
        ("replicas", "shared tokens", "choose", "record", "each memory in turn"),
        [
            (
                str(each.replicas),
                str(each.shared_tokens),
                *(f"{1e3 * s:.2f} ms" for s in (each.choose_s, each.record_s, each.each_memory_s)),
            )
            for each in found
        ],
    )


def decision_table(found: Sequence[Decisions]) -> str:
    """Return one line per rate."""
    return markdown(
        ("arrivals a second", "a reading", "a decision", "memory", "replicas decided"),
        [
            (
                str(each.arrivals_per_s),
                f"{1e3 * each.reading_s:.2f} ms",
                f"{1e3 * each.decide_s:.1f} ms",
                f"{each.kept_bytes / 1e6:.1f} MB",
                str(each.replicas),
            )
            for each in found
        ],
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.fleet", description=__doc__)
    parser.add_argument("--replicas", type=int, nargs="+", default=REPLICAS)
    parser.add_argument("--rates", type=int, nargs="+", default=RATES)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args(argv)
    places = itertools.product(args.replicas, SHARED_TOKENS)
    choices = [measure_choice(replicas, tokens, args.runs) for replicas, tokens in places]
    print(f"{choice_table(choices)}\n")
    decisions = [measure_decisions(rate, args.runs) for rate in args.rates]
    print(decision_table(decisions))
    results = {
        "choices": [asdict(each) for each in choices],
        "decisions": [asdict(each) for each in decisions],
    }
    write_json(args.out, provenance(SEED), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
