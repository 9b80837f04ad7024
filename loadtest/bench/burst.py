"""Ten times the load for a minute on the real app: `make bench-burst`.

One app with admission, one trace, asked twice: once at the deployment's keep rate, which admission
may go down to its floor, and once with the same rate asked for, which it may not. Everything else
(queues, deadlines, what is shed) is the same for both, and so are the prompts. The models are those
of `versus`: random, since time does not depend on weights, and of such sizes that the main model's
prefill dominates, as it does in production.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from specprefill.config import AdmissionConfig, AppConfig, local_path
from specprefill.lab.loadtest import session
from specprefill.lab.loadtest.arrivals import RecordedTrace as TraceArrivals
from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.scenario import Prompts, Scenario, Target
from specprefill.lab.loadtest.session import Run
from specprefill.lab.loadtest.statistics import RequestSlo, Summary
from specprefill.lab.reporting.tables import markdown, provenance, write_json
from specprefill.lab.simulation.trace import Trace, bursty, poisson, write_trace

from .calibration import fit, sample
from .processes import Watch
from .servers import RunningServer, run_ours
from .validation import BASE, KEEP, LENGTHS, LONGEST, OUT, draw_trace, sustainable_qps
from .versus import serve_config

FACTOR = 10.0
BURST_S, BEFORE_S, AFTER_S = 60.0, 20.0, 20.0
KEEP_FLOOR = 0.1
SHORTEST = 1200  # longer than what goes dense by default, so that the arms differ in bending alone
MAX_TOKENS = LONGEST + 512
PATIENCE_S = 120.0  # of the client: much more than the service's deadline
QUEUED_S = 0.1  # a request that waited longer is counted as queued
ADAPTIVE, FIXED = "keep rate lowers", "keep rate fixed"
ARMS = {ADAPTIVE: None, FIXED: KEEP}
_STATUS = re.compile(r"\d{3}\b.*: .+|in the stream: .+")  # how the load tester reports a refusal
_SHED = re.compile(r"429 (\w+): ")


@dataclass(frozen=True, slots=True)
class BurstRun:
    """One pass of the trace."""

    name: str
    run: Run
    others: float  # cores that other programs took meanwhile

    @property
    def summary(self) -> Summary:
        """Summary of the pass."""
        return self.run.summary

    @property
    def queued_requests(self) -> int:
        """Number of answered requests that had waited."""
        waits_s = (one.report_number("queue_s") for one in self.run.outcomes)
        return sum(1 for each in waits_s if each is not None and each > QUEUED_S)

    @property
    def shed_requests(self) -> dict[str, int]:
        """Number of refused requests by the service's reason."""
        refused = (
            one.stream for one in self.run.outcomes if one.stream.ending is RequestEnding.SHED
        )
        found = (_SHED.match(stream.error) for stream in refused)
        return dict(Counter("untold" if each is None else each[1] for each in found))


def unexplained_endings(outcomes: Sequence[RequestOutcome]) -> list[str]:
    """Return what ended neither in an answer nor in a status with a reason."""
    return [
        f"request {one.index}: {one.stream.ending}: {one.stream.error}"
        for one in outcomes
        if one.stream.ending is not RequestEnding.ANSWERED and not _STATUS.match(one.stream.error)
    ]


def configure(config: AppConfig, ttft_s: float, deadline_s: float) -> AppConfig:
    """Return the configuration with admission, and the default keep rate for every long prompt."""
    admission = AdmissionConfig(ttft_s=ttft_s, keep_floor=KEEP_FLOOR)
    limits = {"request_timeout_s": deadline_s, "admission": admission}
    gateway = config.gateway.model_copy(update=limits)
    selection = config.selection.model_copy(update={"keep": KEEP, "min_gain": None})
    return config.model_copy(update={"gateway": gateway, "selection": selection})


def burst_trace(most_qps: float, share: float, seed: int) -> Trace:
    """Return a quiet spell, a minute of `FACTOR` times the rate, and a quiet spell."""
    rate = bursty(share * most_qps, FACTOR, BURST_S, every_s=1e9, first_s=BEFORE_S)
    return draw_trace(rate, BEFORE_S + BURST_S + AFTER_S, seed, SHORTEST)


async def ask(
    name: str,
    served: RunningServer,
    path: Path,
    requests: int,
    source: Source,
    args: argparse.Namespace,
) -> BurstRun:
    """Send the trace once."""
    kind = Prompts(keep=ARMS[name], max_tokens=int(LENGTHS.output_tokens))
    scenario = Scenario(
        target=Target(address=served.url, model=served.model),
        tokenizer=local_path("models/demo-main"),
        prompts=(kind,),
        arrivals=TraceArrivals(kind="trace", path=str(path)),
        length={"requests": requests},
        timeout_s=PATIENCE_S,
        slo=RequestSlo(ttft_s=args.slo),
        seed=args.seed,
    )
    watch = Watch()
    with watch.looking():
        run = await session.measure(scenario, source, lambda _progress: None)
    return BurstRun(name, run, watch.mean_others())


async def measure(
    args: argparse.Namespace, served: RunningServer, config: AppConfig
) -> tuple[float, Trace, list[BurstRun]]:
    """Calibrate, choose the rates, and ask in every arm, one after the other."""
    source = Source.load(local_path("models/demo-main"), args.seed)
    caller = session.caller_of(Target(address=served.url, model=served.model))
    async with caller.open():
        slots = config.decode.max_num_seqs or 1
        found = fit(await sample(source, caller, KEEP, int(LENGTHS.output_tokens)), slots)
    most = sustainable_qps(draw_trace(poisson(1.0), 1000.0, args.seed, SHORTEST), found, KEEP)
    trace = burst_trace(most, args.share, args.seed)
    print(
        f"sustainable at a keep rate of {KEEP:g}: {most:.2f} requests/s; "
        f"asked: {args.share * most:.2f}, and {FACTOR:g} times that for {BURST_S:g} s: "
        f"{len(trace)} requests",
        flush=True,
    )
    path = args.out.parent / "burst" / "trace.jsonl"
    write_trace(path, trace)
    arms = []
    for name in args.arms:
        arms.append(await ask(name, served, path, len(trace), source, args))
        print(f"\n{table(arms)}", flush=True)
    return most, trace, arms


HEADERS = (
    "arm", "attainment", "goodput /s", "keep rate", "TTFT p50", "TTFT p95", "answered", "queued",
    "shed", "other", "others' cores",
)  # fmt: skip


def table(arms: Sequence[BurstRun]) -> str:
    """Return one line per pass, in the order of asking."""
    return markdown(HEADERS, [_cells(arm) for arm in arms])


def _cells(arm: BurstRun) -> list[str]:
    summary, endings = arm.summary, dict(arm.summary.endings)
    answered, shed = endings.pop(RequestEnding.ANSWERED, 0), endings.pop(RequestEnding.SHED, 0)
    reasons = ", ".join(f"{reason} {count}" for reason, count in arm.shed_requests.items())
    return [
        arm.name,
        f"{summary.attainment:.3f}",
        f"{summary.goodput_qps:.2f}",
        f"{summary.keep_rate:.3f}",
        _seconds(summary.ttft_s.p50),
        _seconds(summary.ttft_s.p95),
        str(answered),
        str(arm.queued_requests),
        f"{shed} ({reasons})" if shed else "0",
        ", ".join(f"{ending} {count}" for ending, count in endings.items()) or "0",
        f"{arm.others:.2f}",
    ]


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if isfinite(value) else "no first token"


def options(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.burst", description=__doc__)
    parser.add_argument("--slo", type=float, default=6.0, help="seconds to the first token")
    parser.add_argument("--deadline", type=float, default=30.0, help="seconds of a whole answer")
    parser.add_argument(
        "--share",
        type=float,
        default=0.15,
        help="base rate, as a share of what the app can sustain in theory",
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=[ADAPTIVE, FIXED])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=OUT / "bench-burst.json")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, write. Exits 1 when a request was lost without a status and a reason."""
    args = options(argv)
    folder = args.out.parent.resolve() / "burst"
    folder.mkdir(parents=True, exist_ok=True)
    base = Path(local_path(BASE))
    config = configure(serve_config(folder, MAX_TOKENS), args.slo, args.deadline)
    with run_ours(base, folder, config) as served:
        most, trace, arms = asyncio.run(measure(args, served, config))
    lost = [line for arm in arms for line in unexplained_endings(arm.run.outcomes)]
    print(
        "\n" + ("\n".join(lost) or "every request ended in an answer or in a status with a reason")
    )
    results: dict[str, Any] = {
        "bearable_qps": most,
        "requests": len(trace),
        "slo_s": args.slo,
        "deadline_s": args.deadline,
        "arms": [_as_json(arm) for arm in arms],
        "lost": lost,
    }
    write_json(args.out, provenance(args.seed), results)
    print(f"written to {args.out}")
    return 1 if lost else 0


def _as_json(arm: BurstRun) -> dict[str, Any]:
    each = [
        {"time_s": one.scheduled_s, "ttft_s": one.ttft_s, "ending": one.stream.ending.value,
         "error": one.stream.error, **(one.stream.report or {})}
        for one in arm.run.outcomes
    ]  # fmt: skip
    counts = {"queued": arm.queued_requests, "shed": arm.shed_requests, "others_cores": arm.others}
    return {"name": arm.name, "summary": asdict(arm.summary), **counts, "each": each}


if __name__ == "__main__":
    sys.exit(main())
