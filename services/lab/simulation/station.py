"""One pool in a simulation: a queue, and servers that start, retire and die."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from math import inf

Waiting = tuple[bool, float, int, int]  # late, tag, serial, request


@dataclass(slots=True)
class QueuedWork:
    """Requests that wait, and the seconds that they take together."""

    count: int = 0
    work_s: float = 0.0

    def add(self, work_s: float) -> None:
        """Count a request that joins."""
        self.count += 1
        self.work_s += work_s

    def remove(self, work_s: float) -> None:
        """Count a request that leaves."""
        self.count -= 1
        self.work_s -= work_s


class Station:
    """A replica has `slots` servers. The tag orders the queue: arrival, or fair-share tag.

    `times_s` are the seconds that every request takes here; they may change until it waits.
    """

    __slots__ = (
        "billed_s", "free", "in_time", "late", "ready", "retiring", "running", "serial", "slots",
        "starts", "times_s", "updated_s", "waiting",
    )  # fmt: skip

    def __init__(self, replicas: int, slots: int, times_s: Sequence[float]) -> None:
        self.slots = slots
        self.times_s = times_s
        self.ready = replicas
        self.starts: list[int] = []  # names of those that start, oldest first
        self.retiring = 0  # servers that stop when their request ends
        self.free = replicas * slots
        self.waiting: list[Waiting] = []
        self.running: dict[int, int] = {}  # request -> the serial of its start
        self.serial = 0
        self.in_time, self.late = QueuedWork(), QueuedWork()  # the late ones come last
        self.billed_s = 0.0
        self.updated_s = 0.0

    @property
    def size(self) -> int:
        """Number of replicas that are ready or starting."""
        return self.ready + len(self.starts)

    def bill(self, now_s: float) -> None:
        """Count replica-seconds up to now. Call before a size changes."""
        retiring = -(-self.retiring // self.slots)
        self.billed_s += (self.size + retiring) * (now_s - self.updated_s)
        self.updated_s = now_s

    def wait(self, request: int, tag: float, *, late: bool) -> None:
        """Join the queue."""
        self.serial += 1
        heappush(self.waiting, (late, tag, self.serial, request))
        (self.late if late else self.in_time).add(self.times_s[request])

    @property
    def next_tag(self) -> float:
        """The tag of the next request; infinite for a late one. Raises IndexError as `take_next`"""
        late, tag, _, _ = self.waiting[0]
        return inf if late else tag

    def take_next(self) -> tuple[float, int]:
        """Take the next request, with its tag. Raises IndexError when nobody waits."""
        late, tag, _, request = heappop(self.waiting)
        (self.late if late else self.in_time).remove(self.times_s[request])
        return tag, request

    def waits_s(self) -> tuple[float, float]:
        """Return the expected wait behind those in time, and behind all: work over engines."""
        if self.free > 0:
            return 0.0, 0.0
        ready = self.ready or 1
        until_free_s = self.in_time.work_s / max(1, self.in_time.count) / 2 / ready
        in_time_s = until_free_s + self.in_time.work_s / ready
        return in_time_s, in_time_s + self.late.work_s / ready

    def start(self, request: int) -> int:
        """Give `request` to a server; return a serial number that distinguishes its runs."""
        self.free -= 1
        self.serial += 1
        self.running[request] = self.serial
        return self.serial

    def hand_over(self, old: int, new: int) -> None:
        """Let the server of `old` go on with `new`, in the same run."""
        self.running[new] = self.running.pop(old)

    def end(self, request: int, serial: int) -> bool:
        """Free or retire a server that is done. False if it died before."""
        if self.running.get(request) != serial:
            return False
        del self.running[request]
        if self.retiring > 0:
            self.retiring -= 1
        else:
            self.free += 1
        return True

    def resize(self, target: int, now_s: float) -> list[int]:
        """Move toward `target` replicas; return the names of those that start now.

        The youngest starts are given up first, then idle servers, then busy ones when done.
        """
        self.bill(now_s)
        names = []
        for _ in range(target - self.size):
            self.serial += 1
            names.append(self.serial)
        self.starts += names
        while self.starts and self.size > target:
            self.starts.pop()
        self._retire(max(0, self.ready - target))
        return names

    def add_ready(self, name: int, now_s: float) -> bool:
        """Add a started replica, which is ready; False if it was given up meanwhile."""
        if name not in self.starts:
            return False
        self.bill(now_s)
        self.starts.remove(name)
        self.ready += 1
        self.free += self.slots
        return True

    def die(self, replicas: int, now_s: float) -> Iterator[tuple[int, int]]:
        """Lose replicas with an even share of what runs; yield lost requests with their runs."""
        self.bill(now_s)
        lost = min(replicas, self.ready)
        busy = round(len(self.running) * lost / self.ready) if self.ready > 0 else 0
        self.ready -= lost
        self.free -= max(0, lost * self.slots - busy)
        for request in list(self.running)[:busy]:
            yield request, self.running.pop(request)

    def _retire(self, replicas: int) -> None:
        self.ready -= replicas
        servers = replicas * self.slots
        idle = min(servers, self.free)
        self.free -= idle
        self.retiring += servers - idle
