"""Kills replicas on schedule while a load test runs."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .scenario import Kill


class ProcessFinder(Protocol):
    """Finds the processes of a pool."""

    def replica_pids(self, pool: str) -> Sequence[int]:
        """Return the processes of the pool's running replicas."""
        ...


@dataclass(frozen=True, slots=True)
class KilledReplica:
    """A fault that happened. `pid` is None where the pool had no replica to kill."""

    at_s: float
    pool: str
    pid: int | None


async def inject(
    kills: Sequence[Kill], replicas: ProcessFinder, rng: random.Random, done: list[KilledReplica]
) -> None:
    """SIGKILL one replica per entry, `at_s` seconds from now; append what happened to `done`."""
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    for kill in sorted(kills, key=lambda one: one.at_s):
        await asyncio.sleep(max(0.0, started_s + kill.at_s - loop.time()))
        pids = await asyncio.to_thread(replicas.replica_pids, kill.pool)
        pid = rng.choice(pids) if pids else None
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
        done.append(KilledReplica(loop.time() - started_s, kill.pool, pid))
