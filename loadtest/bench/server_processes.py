"""Memory and time of a server's processes. Linux: it reads /proc."""

from __future__ import annotations

import asyncio
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

_REPLICA = re.compile(r"ServeReplica:[^:]+:(\w+)")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_WATCHED_S = 0.2
_IDLE_SHARE = 0.25  # of a core: Ray's own processes are never quite still


@dataclass(frozen=True, slots=True)
class Process:
    """One line of a process table."""

    pid: int
    parent: int
    name: str
    resident_bytes: int
    cpu_s: float


def processes(proc: Path = Path("/proc")) -> list[Process]:
    """Return all that run now."""
    found = []
    for folder in proc.iterdir():
        if folder.name.isdigit():
            try:
                found.append(_read(folder))
            except (FileNotFoundError, ProcessLookupError):
                continue  # it has ended meanwhile
    return found


def resident_by_pool(running: Sequence[Process], root: int, rest: str) -> dict[str, int]:
    """Return resident bytes of `root` and all below it, by Serve deployment; others are `rest`.

    An engine's processes belong to the replica that started them.
    """
    totals: dict[str, int] = defaultdict(int)
    for process, pool in _tree(running, root, rest):
        totals[pool] += process.resident_bytes
    return dict(totals)


async def wait_idle(roots: Sequence[int]) -> None:
    """Wait until these processes and all below them leave the cores to others.

    Plain vLLM's worker spins on its queue for a second after its last step: whoever is asked in
    that second shares the cores with it.
    """
    used_s = _cpu_s(roots)
    while True:
        await asyncio.sleep(_WATCHED_S)
        before_s, used_s = used_s, _cpu_s(roots)
        if used_s - before_s <= _IDLE_SHARE * _WATCHED_S:
            return


def _cpu_s(roots: Sequence[int]) -> float:
    running = processes()
    return sum(each.cpu_s for root in roots for each, _ in _tree(running, root, ""))


def _tree(running: Sequence[Process], root: int, rest: str) -> Iterator[tuple[Process, str]]:
    """Yield `root` and all below it, each with the pool that it belongs to."""
    children: Mapping[int, list[Process]] = defaultdict(list)
    for process in running:
        children[process.parent].append(process)
    waiting = [(process, rest) for process in running if process.pid == root]
    while waiting:
        process, above = waiting.pop()
        replica = _REPLICA.search(process.name)
        pool = above if replica is None else replica.group(1)
        yield process, pool
        waiting += [(child, pool) for child in children[process.pid]]


def _read(folder: Path) -> Process:
    name = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    fields = (folder / "stat").read_text().rpartition(")")[2].split()
    pages = int((folder / "statm").read_text().split()[1])
    cpu_s = (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return Process(int(folder.name), int(fields[1]), name, pages * _PAGE_BYTES, cpu_s)
