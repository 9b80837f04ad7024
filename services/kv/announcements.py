"""Announces to listeners which leases' KV will soon be complete."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Announcement:
    """A lease that may be pulled now: its last frames are being computed."""

    lease_id: str
    tokens: int  # k
    fingerprint: str


class Announcements:
    """Fans out to every listener. Pure and thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._listeners: set[queue.SimpleQueue[Announcement | None]] = set()

    def announce(self, announcement: Announcement) -> None:
        """Send to every listener of this moment. Never waits."""
        with self._lock:
            for listener in self._listeners:
                listener.put(announcement)

    def listen(self, on_end: Callable[[Callable[[], None]], bool]) -> Iterator[Announcement]:
        """Yield announcements from now on.

        `on_end` is given a function that ends the iteration from another thread; it returns False
        where the iteration is to end before it starts.
        """
        mine: queue.SimpleQueue[Announcement | None] = queue.SimpleQueue()
        if not on_end(lambda: mine.put(None)):
            return
        with self._lock:
            self._listeners.add(mine)
        try:
            while (announcement := mine.get()) is not None:
                yield announcement
        finally:
            with self._lock:
                self._listeners.discard(mine)
