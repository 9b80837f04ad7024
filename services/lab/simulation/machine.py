"""One machine under all pools, as a laptop or a CI runner has it: its cores are shared evenly.

Where every engine has an accelerator of its own, a stage takes what it takes. On a shared machine
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
        """Of each of `threads` busy ones, beside one alone."""
        if threads <= 1:
            return min(1.0, self.cores)
        if threads >= self.cores:
            return self.together * self.cores / threads
        return 1.0 - (1.0 - self.together) * (threads - 1) / (self.cores - 1)


class Cores:
    """Who computes on the machine, and who is done next.

    All jobs advance at one speed, so the order of their ends is known when they begin: each ends
    when the work done by a thread since the start, `_work_s`, has grown by its own.
    """

    def __init__(self, machine: Machine, threads: Mapping[int, Threads]) -> None:
        """`threads`: by kind of job; kinds that are not in it have a thread per job."""
        self._machine = machine
        self._threads = threads
        self._ends: list[tuple[float, int, Job]] = []
        self._running: Counter[int] = Counter()  # jobs by kind
        self._live: set[Job] = set()
        self._begun = 0
        self._work_s = 0.0
        self._now_s = 0.0
        self._speed = 1.0

    def begin(self, now_s: float, kind: int, request: int, run: int, work_s: float) -> None:
        """A job of `work_s`, alone."""
        self._advance(now_s)
        job = (kind, request, run)
        self._begun += 1
        heappush(self._ends, (self._work_s + work_s, self._begun, job))
        self._live.add(job)
        self._count(kind, 1)

    def drop(self, now_s: float, kind: int, request: int, run: int) -> None:
        """A job died with its engine."""
        self._advance(now_s)
        self._live.remove((kind, request, run))
        self._count(kind, -1)

    def become(self, now_s: float, machine: Machine) -> None:
        """Other programs take more or less of the machine from now on."""
        self._advance(now_s)
        self._machine = machine
        self._adjust()

    def due_s(self) -> float:
        """When the next job ends, unless another begins before; infinity if none runs."""
        while self._ends and self._ends[0][2] not in self._live:
            heappop(self._ends)
        if not self._ends:
            return inf
        return self._now_s + max(0.0, self._ends[0][0] - self._work_s) / self._speed

    def end(self) -> tuple[float, Job]:
        """The next job is done. Raises IndexError when none runs."""
        now_s = self.due_s()
        end_s, _, job = heappop(self._ends)
        self._now_s, self._work_s = now_s, end_s
        self._live.remove(job)
        self._count(job[0], -1)
        return now_s, job

    def _advance(self, now_s: float) -> None:
        self._work_s += (now_s - self._now_s) * self._speed
        self._now_s = now_s

    def _count(self, kind: int, change: int) -> None:
        self._running[kind] += change
        self._adjust()

    def _adjust(self) -> None:
        busy = 0
        for each, jobs in self._running.items():
            most = self._threads.get(each)
            busy += jobs if most is None else min(jobs, most())
        self._speed = self._machine.speed(busy)
