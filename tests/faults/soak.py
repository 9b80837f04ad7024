"""`make soak`: 500 clients in conversations for half an hour, over engines that take only time.

Clients leave, a replica of every pool is killed again and again, and the application is upgraded
while they talk (`cluster/mock.yaml`). No request may be lost or cut short, and no
process may grow. Prints the service's own share of the time to a first token: what is left of it
without the stages, of the requests that lost no replica; of those that did, the whole time. Exits 1
otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from specprefill.deployment.file import load, with_ports
from specprefill.deployment.serve_api import DeploymentFailed, ServeApi
from specprefill.lab.loadtest import session
from specprefill.lab.loadtest.outcome import RequestEnding, RequestOutcome
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.results import run_table
from specprefill.lab.loadtest.runner import RunProgress
from specprefill.lab.loadtest.scenario import Scenario
from specprefill.lab.loadtest.session import Run
from specprefill.lab.loadtest.statistics import Distribution
from specprefill.lab.reporting.tables import provenance, write_json
from tests.fuzz.served import HOST, serving
from tests.fuzz.watch import SPARE_BYTES, SPARE_SHARE, Watch

POOLS = {"Speculator": 8, "Prefill": 16, "Decode": 20}  # replicas: room for all clients
SPEED = 0.03  # of the engines: 500 streams at once, and few enough tokens a second for two cores
ANSWER_TOKENS, TURNS = 64, 4
KILL_EVERY_S, SAMPLE_EVERY_S = 20.0, 5.0
# Of a client: while an upgrade starts fifty processes on two cores, tokens take 2.5 times as long.
PATIENCE_S = 600.0
UPGRADE_S = 600.0  # at most
UPGRADE_AT = 0.25  # of the run
COMPARED = (0.45, 0.7), (0.85, 1.0)  # parts of the run between which nothing may grow
STARTING = 0.1  # part of the run that a process may take to be as large as it stays
STAGES = ("queue_s", "speculate_s", "prefill_s")  # before the first token


@dataclass(slots=True)
class Memory:
    """The resident memory of every process, over the run."""

    names: dict[int, str] = field(default_factory=dict)
    samples: dict[int, list[tuple[float, int]]] = field(default_factory=dict)  # share, bytes

    def sample(self, watch: Watch, share: float) -> None:
        """Note what each process holds now."""
        for pid, held in watch.holdings().items():
            self.names[pid] = held.name
            self.samples.setdefault(pid, []).append((share, held.resident_bytes))

    def changes(self) -> dict[str, tuple[int, int]]:
        """Return the median bytes of each process in both compared parts, if it lived in both.

        What it held while it started does not count: on full cores that takes minutes.
        """
        found = {}
        for pid, samples in self.samples.items():
            grown_up = samples[0][0] + STARTING if samples[0][0] > 0.01 else 0.0
            parts = [
                [held for at, held in samples if max(low, grown_up) <= at <= high]
                for low, high in COMPARED
            ]
            if all(parts):
                found[f"{self.names[pid]} ({pid})"] = (int(median(parts[0])), int(median(parts[1])))
        return found


@dataclass(frozen=True, slots=True)
class Upgrade:
    """What became of the rolling upgrade."""

    seconds: float
    fault: str | None

    def __str__(self) -> str:
        return f"upgraded in {self.seconds:.0f} s" if self.fault is None else self.fault


@dataclass(slots=True)
class Findings:
    """What a run showed."""

    run: Run
    memory: Memory
    upgrade: Upgrade

    @property
    def overhead_s(self) -> Distribution:
        """The time to the first token, without the engines' stages."""
        return Distribution.from_values(overhead_s(one) for one in self.run.outcomes)

    @property
    def moved_ttft_s(self) -> Distribution:
        """The whole time to the first token of the requests that lost a replica and went on."""
        return Distribution.from_values(one.ttft_s for one in self.run.outcomes if was_moved(one))

    @property
    def moved(self) -> int:
        """The number of requests that went on where a replica was lost under them."""
        return sum(was_moved(one) for one in self.run.outcomes)

    @property
    def faults(self) -> list[str]:
        """Return what must not be."""
        upgrade = [self.upgrade.fault] if self.upgrade.fault else []
        return [*upgrade, *lost(self.run.outcomes), *grown(self.memory.changes())]


def was_moved(one: RequestOutcome) -> bool:
    """Return True if a replica was lost under the request, before or after its first token."""
    return bool(one.report_number("retries"))


def overhead_s(one: RequestOutcome) -> float | None:
    """Return what the service added; None where the stages are not known.

    A request that was not answered has no report. One whose replica died may have run stages twice,
    of which the report holds one; it does not show whether that was before the first token.
    """
    if one.stream.ending is not RequestEnding.ANSWERED or one.ttft_s is None or was_moved(one):
        return None
    return one.ttft_s - sum(one.report_number(stage) or 0.0 for stage in STAGES)


def lost(outcomes: Sequence[RequestOutcome]) -> list[str]:
    """Return the requests that were not answered in full and pruned, but for those that left."""
    faults = []
    for one in outcomes:
        got = one.stream
        if got.ending is RequestEnding.CANCELLED:
            continue
        if got.ending is not RequestEnding.ANSWERED:
            faults.append(f"request {one.index}: {got.ending} {got.error}; {course(one)}")
        elif got.output_tokens != ANSWER_TOKENS:
            faults.append(f"request {one.index}: {got.output_tokens} of {ANSWER_TOKENS} tokens")
        elif (got.report or {}).get("reason") == "speculator_unavailable":
            faults.append(f"request {one.index}: not pruned, although other speculators ran")
    return faults


def course(one: RequestOutcome) -> str:
    """Return when a request was sent, and how much of its answer came."""
    sent_s = one.scheduled_s + one.lag_s
    arrivals = one.stream.arrivals_s
    if not arrivals:
        return f"sent at {sent_s:.0f} s, no token"
    return (
        f"sent at {sent_s:.0f} s, {len(arrivals)} pieces of text from {arrivals[0]:.0f} s to "
        f"{arrivals[-1]:.0f} s later"
    )


def grown(changes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Return the processes that hold more than allocators explain."""
    return [
        f"{name}: {before >> 20} -> {after >> 20} MiB"
        for name, (before, after) in changes.items()
        if after > before * (1 + SPARE_SHARE) + SPARE_BYTES
    ]


def deployment(file: Path) -> dict[str, Any]:
    """Return the file's content at this size and speed."""
    raw = load(file).raw
    (application,) = raw["applications"]
    application["runtime_env"]["env_vars"]["SPECPREFILL_MOCK_SPEED"] = str(SPEED)
    application["args"]["speculator"] |= {"timeout_s": PATIENCE_S, "max_queued": 256}
    application["args"]["gateway"] = {"request_timeout_s": PATIENCE_S}
    for one in application["deployments"]:
        one["num_replicas"] = POOLS.get(one["name"], one["num_replicas"])
    return raw


def upgraded(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return the same with another environment, for which every replica is replaced."""
    new = copy.deepcopy(dict(raw))
    (application,) = new["applications"]
    application["runtime_env"]["env_vars"]["SPECPREFILL_SOAK_RELEASE"] = "2"
    return new


def scenario(address: str, dashboard: str, clients: int, seconds: float, seed: int) -> Scenario:
    """Return the load: conversations of a closed loop, of which some end early."""
    pools = list(POOLS)
    count = int(seconds / KILL_EVERY_S)
    kills = [
        {"at_s": KILL_EVERY_S * (n + 0.5), "pool": pools[n % len(pools)]} for n in range(count)
    ]
    return Scenario.model_validate({
        "target": {"address": address, "model": "mock"},
        "tokenizer": "models/demo-main",
        "prompts": [{"family": "needles", "prompt_tokens": 1200, "max_tokens": ANSWER_TOKENS}],
        "arrivals": {"kind": "concurrency", "clients": clients},
        "conversation": {"turns": TURNS, "growth_tokens": 200, "think_s": 0},
        "length": {"seconds": seconds},
        "cancel": {"share": 0.2, "after_s": (0.0, 30.0)},
        "chaos": {"dashboard": dashboard, "kills": kills},
        "timeout_s": PATIENCE_S,
        "seed": seed,
    })  # fmt: skip


async def soak(raw: Mapping[str, Any], clients: int, seconds: float, seed: int) -> Findings:
    """Serve the deployment, load it, and upgrade it on the way."""
    with serving(raw) as served:
        address = f"http://{HOST}:{served.http_port}/v1"
        asked = scenario(address, served.dashboard_url, clients, seconds, seed)
        source = Source.load(asked.tokenizer, seed)
        api = await asyncio.to_thread(ServeApi, served.dashboard_url)
        new = with_ports(upgraded(raw), served.http_port, served.grpc_port)
        memory = Memory()
        beside = asyncio.create_task(sample_often(memory, served.watch, seconds))
        upgrading = asyncio.create_task(upgrade(api, new, UPGRADE_AT * seconds))
        run = await session.measure(asked, source, show)
        beside.cancel()
        return Findings(run, memory, await upgrading)


async def sample_often(memory: Memory, watch: Watch, seconds: float) -> None:
    """Note what every process holds, until cancelled."""
    started_s = time.monotonic()
    while True:
        share = (time.monotonic() - started_s) / seconds
        await asyncio.to_thread(memory.sample, watch, share)
        await asyncio.sleep(SAMPLE_EVERY_S)


async def upgrade(api: ServeApi, new: Mapping[str, Any], after_s: float) -> Upgrade:
    """Deploy `new` after a while, and wait until every replica is of it."""
    await asyncio.sleep(after_s)
    began_s = time.monotonic()
    fault = None
    try:
        await asyncio.to_thread(api.deploy, new)
        await asyncio.to_thread(api.wait_healthy, UPGRADE_S, lambda _line: None)
    except DeploymentFailed as error:
        fault = f"the upgrade: {error}"
    return Upgrade(time.monotonic() - began_s, fault)


def show(progress: RunProgress) -> None:
    """Rewrite one line on a terminal; write nothing to files."""
    if sys.stderr.isatty():
        line = (
            f"{progress.sent} sent, {progress.in_flight} in flight, {progress.other} not answered"
        )
        print(f"\r{line} ", end="", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Run once, print what was found, and judge it."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--file", type=Path, default=Path("cluster/mock.yaml"))
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args(argv)
    raw = deployment(args.file)
    found = asyncio.run(soak(raw, args.clients, args.minutes * 60.0, args.seed))
    write_json(Path("out") / "soak.json", provenance(args.seed), figures(found, args.clients))
    print(run_table([found.run.summary]))
    print(f"\nkilled {len(found.run.kills)} replicas under {found.moved} requests; {found.upgrade}")
    own = found.overhead_s
    print(
        f"the service's own part of the time to a first token: {percentiles(own)}; of the "
        f"{own.count} of {len(found.run.outcomes)} requests that were answered and lost no replica"
    )
    print(
        f"the whole time to a first token of those that lost one: {percentiles(found.moved_ttft_s)}"
    )
    before, after = (sum(part) >> 20 for part in zip(*found.memory.changes().values(), strict=True))
    print(f"memory of what lived through both parts: {before} -> {after} MiB")
    for fault in found.faults[:40]:
        print(f"  {fault}")
    return 1 if found.faults else 0


def percentiles(seconds: Distribution) -> str:
    """Return the median and the tail, in milliseconds."""
    if seconds.count == 0:
        return "-"
    shares = (("p50", seconds.p50), ("p95", seconds.p95), ("p99", seconds.p99))
    return ", ".join(f"{name} {value * 1e3:.0f} ms" for name, value in shares)


def figures(found: Findings, clients: int) -> dict[str, Any]:
    """Return what the JSON file holds."""
    return {
        "clients": clients,
        "summary": asdict(found.run.summary),
        "moved": found.moved,
        "overhead_s": asdict(found.overhead_s),
        "moved_ttft_s": asdict(found.moved_ttft_s),
        "kills": [asdict(kill) for kill in found.run.kills],
        "upgraded_in_s": found.upgrade.seconds,
        "memory_bytes": found.memory.changes(),
        "faults": found.faults,
        "requests": [_row(one) for one in found.run.outcomes],
    }


def _row(one: RequestOutcome) -> list[object]:
    """Return when a request was sent, then its first and last text, its end and how it ended."""
    arrivals = one.stream.arrivals_s
    edges = [round(arrivals[0], 2), round(arrivals[-1], 2)] if arrivals else [None, None]
    retries = one.report_number("retries")
    sent_s, end_s = round(one.scheduled_s + one.lag_s, 2), round(one.stream.end_s, 2)
    return [sent_s, *edges, end_s, one.stream.ending.value, retries]


if __name__ == "__main__":
    sys.exit(main())
