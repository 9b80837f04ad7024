"""The commands `specprefill simulate | plan`: pools and their autoscaler without a cluster."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..control.scaling.values import Engines, Pool, Slo
from ..control.stages import Curve, StageCurves
from ..lab.reporting.tables import markdown, provenance, write_json
from ..lab.simulation import hardware, page
from ..lab.simulation.pools import PoolPlan, plans
from ..lab.simulation.scenarios import (
    COLD_START_S,
    ENGINES,
    SLO,
    SimulationScenario,
    compare,
    scenario,
)
from ..lab.simulation.score import HEADERS
from ..lab.simulation.trace import (
    Lengths,
    Rate,
    Trace,
    bursty,
    diurnal,
    generate,
    poisson,
    read_trace,
    write_trace,
)
from ..lab.simulation.world import ReplicaFailure
from .arguments import positive_number, rate, require_charts, zero_or_more
from .exit_codes import Misused

KEEPS = (1.0, 0.5, 0.3, 0.2, 0.1, 0.05)
SHAPES: Mapping[str, Callable[[float, float], Rate]] = {
    "poisson": lambda per_s, _seconds: poisson(per_s),
    "diurnal": diurnal,
    "bursty": lambda per_s, seconds: bursty(per_s, 10.0, seconds / 6, seconds),
}


def add_commands(commands: Any) -> None:
    """Register this module's commands with the parser."""
    _add_simulate(commands)
    _add_plan(commands)


def _add_simulate(commands: Any) -> None:
    simulate = commands.add_parser(
        "simulate",
        help="simulate autoscalers on a trace",
        description="Simulate this project's autoscaler, four others and the clairvoyant optimum "
        "on a trace: JSON lines with time_s, prompt_tokens and output_tokens, or a generated one.",
    )
    simulate.add_argument("trace", nargs="?", type=Path, help="a trace (default: a generated one)")
    simulate.add_argument(
        "--shape", choices=sorted(SHAPES), default="diurnal",
        help="shape of the generated rate; bursty: tenfold for a sixth of the time "
        "(default: %(default)s)",
    )  # fmt: skip
    _add_load(simulate, qps=20.0)
    simulate.add_argument("--hours", type=positive_number, default=1.0, help="default: %(default)g")
    simulate.add_argument(
        "--drift", type=positive_number, default=1.0, metavar="FACTOR",
        help="growth of the generated prompts from start to end (default: %(default)g)",
    )  # fmt: skip
    simulate.add_argument("--seed", type=int, default=1, help="default: %(default)d")
    simulate.add_argument(
        "--cold-start", type=zero_or_more, default=COLD_START_S, metavar="S",
        help="seconds until a new replica is ready (default: %(default)g)",
    )  # fmt: skip
    simulate.add_argument(
        "--fail", type=failure, action="append", default=[], metavar="SECOND:POOL:REPLICAS",
        help="replicas that die at a moment, e.g. 600:prefill:3; may be repeated",
    )  # fmt: skip
    simulate.add_argument(
        "--write-trace", type=Path, metavar="FILE", help="write the trace to FILE"
    )
    simulate.add_argument(
        "--out", type=Path, default=Path("out/simulation"), metavar="NAME",
        help="writes NAME.json and NAME.html (default: %(default)s)",
    )  # fmt: skip
    simulate.set_defaults(run=run_simulate)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="pool sizes and cost for a steady load",
        description="The cheapest pool sizes that meet an SLO at a steady load, per keep rate.",
    )
    _add_load(plan, qps=10.0, default_engines=hardware.ENGINES)
    plan.add_argument(
        "--keep", type=rate, nargs="+", default=list(KEEPS), metavar="RATE",
        help="keep rates to compare (default: %(default)s)",
    )  # fmt: skip
    plan.add_argument(
        "--costs", type=positive_number, nargs=3, default=[1.0, 4.0, 4.0],
        metavar=("SPECULATOR", "PREFILL", "DECODE"),
        help="cost of one replica of each pool, e.g. its GPUs (default: 1 4 4)",
    )  # fmt: skip
    plan.add_argument(
        "--kv", type=positive_number, nargs=3, metavar=("KIB_PER_TOKEN", "GIB", "GB_PER_S"),
        help="keys and values: of one token; room of one decode replica; what it pulls in a "
        "second (default: a 70B model on four H100, over gRPC)",
    )  # fmt: skip
    plan.set_defaults(run=run_plan)


def _add_load(
    command: argparse.ArgumentParser, qps: float, default_engines: Engines = ENGINES
) -> None:
    command.add_argument(
        "--qps",
        type=positive_number,
        default=qps,
        help="mean requests per second (default: %(default)g)",
    )
    command.add_argument(
        "--lengths", type=lengths, default=Lengths(), metavar="PROMPT[:SPREAD][,OUTPUT[:SPREAD]]",
        help="median tokens, and the spread of their logarithm (default: 12000:0.5,200:0.6)",
    )  # fmt: skip
    command.add_argument(
        "--slo", type=positive_number, default=SLO.ttft_s, metavar="S",
        help="seconds to the first token (default: %(default)g)",
    )  # fmt: skip
    command.add_argument(
        "--share", type=float, default=SLO.share,
        help="share of requests that must meet the SLO (default: %(default)g)",
    )  # fmt: skip
    command.add_argument(
        "--engines", type=engines, default=default_engines, metavar="FILE",
        help="JSON with learnt stage curves (default: an 8B speculator before a 70B model)",
    )  # fmt: skip


def run_simulate(args: argparse.Namespace) -> int:
    """Compare, print the table, write JSON and a page."""
    require_charts()
    trace = _trace(args)
    if args.write_trace is not None:
        try:
            write_trace(args.write_trace, trace)
        except OSError as error:
            raise Misused(f"--write-trace: {args.write_trace}: {error.strerror}") from error
    name = str(args.trace or args.shape)
    case = scenario(name, trace, _slo(args), args.engines, args.cold_start)
    case = replace(case, world=replace(case.world, failures=tuple(args.fail)))
    entries = compare(case, lambda _name: None)
    print(f"{name}: {len(trace)} requests in {trace.duration_s:.0f} s\n")
    print(markdown(HEADERS, [each.score.row() for each in entries]))
    scores = [asdict(each.score) for each in entries]
    write_json(args.out.with_suffix(".json"), provenance(args.seed), {"controllers": scores})
    page.write(args.out.with_suffix(".html"), "Simulation", _facts(args, case), [(case, entries)])
    print(f"\nwritten: {args.out.with_suffix('.json')}, {args.out.with_suffix('.html')}")
    return 0


def run_plan(args: argparse.Namespace) -> int:
    """Print one row per keep rate.

    Raises Misused where no decode replica has room for the requests, at any of the rates.
    """
    costs = dict(zip(Pool, args.costs, strict=True))
    kv = _kv_limits(args)
    found = plans(args.qps, args.lengths, args.keep, args.engines, _slo(args), costs, kv)
    shortest = min(each.long_tokens for each in found)
    if shortest > kv.longest_tokens:
        raise Misused(
            f"specprefill plan: one in a hundred requests keeps and answers more than {shortest} "
            f"tokens, and a decode replica has room for {kv.longest_tokens}: more memory for keys "
            "and values (--kv), or a lower --keep"
        )
    headers = ("keep", *Pool, "decode is bound by", "cost", "expected share", "meets the SLO")
    rows = [
        [
            f"{each.keep:g}",
            *(str(each.sizes.of(pool)) for pool in Pool),
            str(each.bound),
            f"{each.cost:g}",
            f"{each.sizes.share:.4f}",
            _verdict(each, kv),
        ]
        for each in found
    ]
    print(markdown(headers, rows))
    return 0


def _verdict(plan: PoolPlan, kv: hardware.KvLimits) -> str:
    if not plan.fits:
        return f"no replica holds {plan.long_tokens} tokens, at most {kv.longest_tokens}"
    return "yes" if plan.reachable else "no size does"


def _kv_limits(args: argparse.Namespace) -> hardware.KvLimits:
    if args.kv is None:
        return hardware.KvLimits()
    token_kib, room_gib, pulled_gb = args.kv
    return hardware.KvLimits(token_kib * 1024, room_gib * (1 << 30), pulled_gb * 1e9)


def lengths(text: str) -> Lengths:
    """Parse `PROMPT[:SPREAD][,OUTPUT[:SPREAD]]`. Raises ValueError."""
    default = Lengths()
    parts = [[float(number) for number in part.split(":")] for part in text.split(",")]
    if len(parts) > 2 or any(len(part) > 2 or min(part) < 0 for part in parts):
        raise ValueError(text)
    prompt, output = parts[0], parts[1] if len(parts) > 1 else [default.output_tokens]
    return Lengths(
        prompt[0],
        prompt[1] if len(prompt) > 1 else default.prompt_spread,
        output[0],
        output[1] if len(output) > 1 else default.output_spread,
    )


def failure(text: str) -> ReplicaFailure:
    """Parse `SECOND:POOL:REPLICAS`. Raises ValueError."""
    time_s, pool, replicas = text.split(":")
    return ReplicaFailure(float(time_s), Pool(pool), int(replicas))


def engines(text: str) -> Engines:
    """Read learnt curves from a file, e.g. `{"speculate": {"base_s": 0.02, "token_s": 1e-5}, ...}`.

    Beside the four stages it may hold `output_token_s`, `decode_slots` and `cached_share`.
    Raises ArgumentTypeError.
    """
    try:
        found = json.loads(Path(text).read_text(encoding="utf-8"))
        stages = ("speculate", "prefill", "transfer", "first_decode")
        curves = StageCurves(*(Curve(**found.pop(stage)) for stage in stages))
        return Engines(curves, **found)
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from error


def _trace(args: argparse.Namespace) -> Trace:
    if args.trace is None:
        seconds = args.hours * 3600
        arriving = SHAPES[args.shape](args.qps, seconds)
        return generate(arriving, seconds, args.lengths, args.seed, drift=args.drift)
    try:
        return read_trace(args.trace)
    except OSError as error:
        raise Misused(f"specprefill simulate: {args.trace}: {error.strerror}") from error
    except ValueError as error:
        raise Misused(f"specprefill simulate: {error}") from error


def _slo(args: argparse.Namespace) -> Slo:
    if not 0.0 < args.share < 1.0:
        raise Misused("specprefill: --share must be between 0 and 1")
    return Slo(args.slo, args.share)


def _facts(args: argparse.Namespace, case: SimulationScenario) -> dict[str, str]:
    return {
        "trace": f"{case.name}, seed {args.seed}, {len(case.trace)} requests",
        "SLO": f"{case.world.slo.share:.1%} within {case.world.slo.ttft_s:g} s",
        "cold start": f"{args.cold_start:g} s",
    }
