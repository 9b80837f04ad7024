"""One machine under all pools, as a laptop or a CI runner has it: its cores are shared evenly.

Where every engine has an accelerator of its own, a stage takes a fixed time. On a shared machine
it takes longer while others compute. Work is counted in seconds of a thread that runs alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

Threads = Callable[[], int]  # the most of one kind that compute at once, now
Job = tuple[int, int, int]  # kind, request, run


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor sharing: every busy thread gets the same part of the cores."""

    cores: float  # less what always runs on them
    together: float = 1.0  # a thread's speed while all cores are busy; 1: as fast as alone

    def speed(self, threads: int) -> float:
        """Return the speed of each of `threads` busy threads, relative to one alone."""
        if threads <= 1:
            return min(1.0, self.cores)
        if threads >= self.cores:
            return self.together * self.cores / threads
        return 1.0 - (1.0 - self.together) * (threads - 1) / (self.cores - 1)


class Cores:
    """The jobs that compute on the machine, and the next to end.

    All jobs advance at one speed, so the order of their ends is known when they start: each ends
    when the work done by a thread since the start, `_work_s`, has grown by its own.
    """

    def __init__(self, machine: Machine, threads: Mapping[int, Threads]) -> None:
        """`threads` is by kind of job; other kinds have a thread per job."""
        self._machine = machine
        self._threads = threads
        self._ends: list[tuple[float, int, Job]] = []
        self._running: Counter[int] = Counter()  # jobs by kind
        self._live: set[Job] = set()
        self.used_s = 0.0  # core-seconds
        self._begun = 0
        self._work_s = 0.0
        self._now_s = 0.0
        self._speed = 1.0
        self._busy = 0  # threads

    def start(self, now_s: float, kind: int, request: int, run: int, work_s: float) -> None:
        """Start a job of `work_s`, measured alone."""
        self._advance(now_s)
        job = (kind, request, run)
        self._begun += 1
        heappush(self._ends, (self._work_s + work_s, self._begun, job))
        self._live.add(job)
        self._count(kind, 1)

    def drop(self, now_s: float, kind: int, request: int, run: int) -> None:
        """Remove a job that died with its engine."""
        self._advance(now_s)
        self._live.remove((kind, request, run))
        self._count(kind, -1)

    def change(self, now_s: float, machine: Machine) -> None:
        """Change the machine: other programs take more or less of it from now on."""
        self._advance(now_s)
        self._machine = machine
        self._adjust()

    def due_s(self) -> float:
        """Return the time when the next job ends, unless another starts before; else infinity."""
        while self._ends and self._ends[0][2] not in self._live:
            heappop(self._ends)
        if not self._ends:
            return inf
        return self._now_s + max(0.0, self._ends[0][0] - self._work_s) / self._speed

    def end(self) -> tuple[float, Job]:
        """End the next job. Raises IndexError when none runs."""
        now_s = self.due_s()
        end_s, _, job = heappop(self._ends)
        self._use_until(now_s)
        self._work_s = end_s
        self._live.remove(job)
        self._count(job[0], -1)
        return now_s, job

    def _advance(self, now_s: float) -> None:
        self._work_s += (now_s - self._now_s) * self._speed
        self._use_until(now_s)

    def _use_until(self, now_s: float) -> None:
        self.used_s += (now_s - self._now_s) * min(self._busy, self._machine.cores)
        self._now_s = now_s

    def _count(self, kind: int, change: int) -> None:
        self._running[kind] += change
        self._adjust()

    def _adjust(self) -> None:
        self._busy = 0
        for each, jobs in self._running.items():
            most = self._threads.get(each)
            self._busy += jobs if most is None else min(jobs, most())
        self._speed = self._machine.speed(self._busy)
