"""The cold start of an engine replica, by stage: `make bench-start`.

Each measurement is a process that does what a decode replica does: it reads its configuration,
imports vLLM and starts its engine with the demo model. One arm starts the engine's process as vLLM
does, the other forks it (`prefill.fork_engine`, `decode.fork_engine`); rounds alternate between
them. Weights are in the page cache for both, and small: what is left is what every start pays.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from specprefill.config import AppConfig
from specprefill.deployment.file import load
from specprefill.lab.reporting.tables import markdown, provenance, write_json

OUT = Path("out") / "bench-start.json"
FILE = Path("cluster/local.yaml")
ARMS = {"a new process": False, "forked": True}


@dataclass(frozen=True, slots=True)
class Start:
    """Seconds of one start; `engine_s` begins when everything is imported."""

    import_s: float
    engine_s: float
    close_s: float

    @property
    def ready_s(self) -> float:
        """Return the seconds from the process's first line until requests are taken."""
        return self.import_s + self.engine_s


def start_here(*, forks: bool) -> Start:
    """Start and stop an engine in this process."""
    began_s = time.perf_counter()
    (application,) = load(FILE).raw["applications"]
    config = AppConfig.model_validate(application["args"])
    from specprefill.engine.fork_server import FORK_SERVER

    if forks:
        FORK_SERVER.start()
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    imported_s = time.perf_counter()
    args = engine_args(config.model, config.decode, config.kv, Role.DECODE, peer=config.prefill)
    engine = Engine(args, cpu_threads=config.decode.cpu_threads, forks=forks)
    engine.start()
    ready_s = time.perf_counter()
    engine.close()
    return Start(imported_s - began_s, ready_s - imported_s, time.perf_counter() - ready_s)


def start_apart(*, forks: bool) -> Start:
    """Start and stop an engine in a process of its own. Raises RuntimeError where it fails."""
    (application,) = load(FILE).raw["applications"]
    command = [sys.executable, "-m", "loadtest.bench.start", "--arm", str(int(forks))]
    environment = {**os.environ, **application["runtime_env"]["env_vars"]}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(done.stderr[-2000:])
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def table(starts: dict[str, list[Start]]) -> str:
    """Return medians, one row per arm."""
    rows = []
    for arm, found in starts.items():
        parts = [
            statistics.median(getattr(one, name) for one in found)
            for name in ("import_s", "engine_s", "ready_s", "close_s")
        ]
        rows.append([arm, *(f"{part:.1f} s" for part in parts)])
    return markdown(("engine process", "imports", "engine", "ready after", "closed in"), rows)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and write the figures."""
    parser = argparse.ArgumentParser(prog="python -m loadtest.bench.start", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arm", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.arm is not None:
        print(json.dumps(asdict(start_here(forks=bool(args.arm)))))
        return 0
    starts: dict[str, list[Start]] = {arm: [] for arm in ARMS}
    for _ in range(args.rounds):
        for arm, forks in ARMS.items():
            starts[arm].append(start_apart(forks=forks))
    print(table(starts))
    figures = {arm: [asdict(one) for one in found] for arm, found in starts.items()}
    write_json(OUT, provenance(0), {"starts": figures})
    return 0


if __name__ == "__main__":
    sys.exit(main())
