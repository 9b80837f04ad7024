"""One pool in a simulation: a queue, and servers that start, retire and die."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heappop, heappush

Waiting = tuple[int, float, int, int]  # late, tag, serial, request


class Station:
    """A replica has `slots` servers. The tag orders the queue: arrival, or fair-share tag."""

    __slots__ = (
        "billed_s", "count", "free", "ready", "retiring", "running", "serial", "slots",
        "starts", "updated_s", "waiting", "work_s",
    )  # fmt: skip

    def __init__(self, replicas: int, slots: int) -> None:
        self.slots = slots
        self.ready = replicas
        self.starts: list[int] = []  # names of those that start, oldest first
        self.retiring = 0  # servers that stop when their request ends
        self.free = replicas * slots
        self.waiting: list[Waiting] = []
        self.running: dict[int, int] = {}  # request -> the serial of its start
        self.serial = 0
        self.work_s = [0.0, 0.0]  # of those that wait: in time, late
        self.count = [0, 0]
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

    def wait(self, request: int, tag: float, late: int, work_s: float) -> None:
        """Join the queue."""
        self.serial += 1
        heappush(self.waiting, (late, tag, self.serial, request))
        self.work_s[late] += work_s
        self.count[late] += 1

    def take_next(self, works_s: list[float]) -> tuple[float, int]:
        """Take the next request, with its tag; `works_s` are the times of all requests.

        Raises IndexError when nobody waits.
        """
        late, tag, _, request = heappop(self.waiting)
        self.work_s[late] -= works_s[request]
        self.count[late] -= 1
        return tag, request

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
