"""Memory that reads land in, shared by all pulls of a worker.

It need not hold what every pull would read ahead: a pull that finds no room stores what it has
read, which gives room back, and then waits in line for the others to do so.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Callable

from ...core.errors import KvTransferError
from .arena import Arena

_CHECK_S = 0.05


class LandingMemory:
    """An arena whose room is given out in the order in which it was asked for. Thread-safe."""

    def __init__(self, arena: Arena, reclaim: Callable[[], bool] = lambda: False) -> None:
        """`reclaim` gives back memory that is no longer needed; False if there was none."""
        self.arena = arena
        self._reclaim = reclaim
        self._line: deque[object] = deque()
        self._moved = threading.Condition()  # the line
        self._freed: queue.SimpleQueue[None] = queue.SimpleQueue()  # finalizers may fill it
        arena.on_free(self._report_free)

    def take(self, size: int) -> memoryview | None:
        """Return `size` uninitialised bytes; None if there is no room, or if others wait for it."""
        return None if self._line else self._take(size)

    def wait(self, size: int, timeout_s: float, check: Callable[[], None]) -> memoryview:
        """Return `size` bytes once they are free and nobody has waited longer.

        The caller holds no room itself: those who wait would wait for each other. `check` is
        called now and then; what it raises ends the wait. Raises KvTransferError after
        `timeout_s`, and at once if `size` exceeds the memory.
        """
        if size > self.arena.memory.nbytes:
            raise KvTransferError(
                f"nixl: {size} bytes cannot land in {self.arena.memory.nbytes} bytes"
            )
        give_up_s = time.monotonic() + timeout_s
        caller = object()
        with self._moved:
            self._line.append(caller)
        try:
            while (left_s := give_up_s - time.monotonic()) > 0:
                check()
                into = self._take_in_turn(caller, size, min(left_s, _CHECK_S))
                if into is not None:
                    return into
        finally:
            with self._moved:
                self._line.remove(caller)
                self._moved.notify_all()
        raise KvTransferError(f"nixl: no room for {size} bytes to land for {timeout_s:g} s")

    def _take_in_turn(self, caller: object, size: int, timeout_s: float) -> memoryview | None:
        """Return room; None after `timeout_s`, or when some was freed."""
        with self._moved:
            if not self._moved.wait_for(lambda: self._line[0] is caller, timeout_s):
                return None
        into = self._take(size)
        if into is None:
            try:
                self._freed.get(timeout=timeout_s)
            except queue.Empty:
                return None
        return into

    def _take(self, size: int) -> memoryview | None:
        into = self.arena.take(size)
        while into is None and self._reclaim():
            into = self.arena.take(size)
        return into

    def _report_free(self) -> None:
        """Wake the first in line. Without a lock: see `Arena.on_free`."""
        if self._line:
            self._freed.put(None)
