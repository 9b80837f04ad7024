"""Measures the work on this machine: this program with its children, and others (Linux)."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PARENT, _USER, _SYSTEM = 1, 11, 12  # fields of /proc/PID/stat, counted from behind the name


@dataclass(frozen=True, slots=True)
class CpuUse:
    """Core-seconds since the start: this program's with its descendants, and the machine's."""

    own_s: float
    all_s: float


def read_use() -> CpuUse:
    """Read the use so far. That of ended descendants is not in `own_s`."""
    cpu, parents = {}, {}
    for folder in _PROC.iterdir():
        if folder.name.isdecimal():
            with suppress(OSError):  # it has ended meanwhile
                fields = (folder / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
                process = int(folder.name)
                parents[process] = int(fields[_PARENT])
                cpu[process] = int(fields[_USER]) + int(fields[_SYSTEM])
    own = sum(ticks for process, ticks in cpu.items() if _descends(process, os.getpid(), parents))
    first = (_PROC / "stat").read_text(encoding="utf-8").partition("\n")[0]
    user, nice, system, _idle, _waiting, *more = map(int, first.split()[1:9])
    return CpuUse(own / _TICKS_PER_S, (user + nice + system + sum(more)) / _TICKS_PER_S)


@dataclass(frozen=True, slots=True)
class BusyCores:
    """Cores at work, on average over a span that starts at `from_s`."""

    from_s: float
    own: float
    others: float


def average_between(before: CpuUse, after: CpuUse, from_s: float, seconds: float) -> BusyCores:
    """Return the averages of a span."""
    own_s = max(0.0, after.own_s - before.own_s)
    others_s = max(0.0, after.all_s - before.all_s - own_s)
    return BusyCores(from_s, own_s / seconds, others_s / seconds)


class Watch:
    """Records the work between one look and the next; time counts from the first look."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seen: list[BusyCores] = []
        self._now = now
        self._began_s = 0.0
        self._first: CpuUse | None = None
        self._last: tuple[float, CpuUse] | None = None

    @contextmanager
    def looking(self, every_s: float = 1.0) -> Iterator[None]:
        """Look often while inside, from a thread: on a full machine a look takes a second."""
        done = threading.Event()

        def look_often() -> None:
            self.look()
            while not done.wait(every_s):
                self.look()

        with ThreadPoolExecutor(1) as thread:
            looks = thread.submit(look_often)
            try:
                yield
            finally:
                done.set()
                looks.result()

    def look(self) -> None:
        """Record the work since the last look."""
        now_s, now = self._now(), read_use()
        if self._last is None:
            self._began_s, self._first = now_s, now
        else:
            then_s, then = self._last
            span = average_between(then, now, then_s - self._began_s, now_s - then_s)
            self.seen.append(span)
        self._last = now_s, now

    def own_s(self, idle: float) -> float:
        """Return this program's core-seconds, less those of `idle` cores all the time.

        Raises ValueError before the first look.
        """
        if self._first is None or self._last is None:
            raise ValueError("nobody has looked yet")
        last_s, last = self._last
        return max(0.0, last.own_s - self._first.own_s - idle * (last_s - self._began_s))

    def mean_others(self) -> float:
        """Return cores that other programs took. Raises StatisticsError before the second look."""
        return fmean(each.others for each in self.seen)


def _descends(process: int, ancestor: int, parents: dict[int, int]) -> bool:
    while process in parents:
        if process == ancestor:
            return True
        process = parents[process]
    return False
