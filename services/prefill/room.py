"""Room for KV, reserved before a prefill starts.

A worker drops what exceeds its cap, and the decode engine then computes the prompt again, beside
the answers that it streams: work that comes back exactly when there is too much of it. So a prefill
waits here until its KV has room.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import ceil

FRAME_SHARE = 1.02  # of the KV, with the headers of its frames
FRAME_BYTES = 4096  # of the last frames' headers
POLL_S = 0.05  # between two looks at the workers, while somebody waits
SETTLE_S = 0.25  # after a prefill its frames may still be on their way to the worker's store


@dataclass(eq=False, slots=True)
class _Reservation:
    size: int
    ended_s: float | None = None  # None: its prefill runs


class Room:
    """The bytes that every worker of an engine may hold, shared by prefills in order of arrival.

    A reservation counts until its prefill has ended; from then on what the workers really hold
    counts, which they are asked for only when there seems to be no room. So the
    count is never too low. `held` returns what the fullest worker holds now; None: not known.
    """

    def __init__(
        self,
        max_bytes: int,
        held: Callable[[], Awaitable[int | None]],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_bytes = max_bytes
        self._held = held
        self._now = now
        self._known_held = 0  # by those that have ended and were looked at since
        self._reservations: set[_Reservation] = set()
        self._turn = asyncio.Lock()  # fair: first come, first served
        self.waiting = 0

    @property
    def bytes_reserved(self) -> int:
        """Bytes that count against the cap now."""
        return self._known_held + sum(each.size for each in self._reservations)

    @asynccontextmanager
    async def reserve(self, kv_bytes: int) -> AsyncIterator[float]:
        """Wait for room; inside, a prefill may fill it. Yields the seconds waited.

        KV that exceeds the cap alone waits for all of it. No KV waits for nothing.
        """
        if kv_bytes == 0:
            yield 0.0
            return
        came_s = self._now()
        size = min(self._max_bytes, ceil(kv_bytes * FRAME_SHARE) + FRAME_BYTES)
        self.waiting += 1
        try:
            async with self._turn:
                await self._wait(size)
                reservation = _Reservation(size)
                self._reservations.add(reservation)
        finally:
            self.waiting -= 1
        try:
            yield self._now() - came_s
        finally:
            reservation.ended_s = self._now()

    async def _wait(self, size: int) -> None:
        """Poll for room: a worker's store does not report when a lease ends."""
        while True:
            if await self._fits(size):
                return
            await asyncio.sleep(POLL_S)

    async def _fits(self, size: int) -> bool:
        if self.bytes_reserved + size <= self._max_bytes:
            return True
        await self._recount()
        return self.bytes_reserved + size <= self._max_bytes

    async def _recount(self) -> None:
        """Count what the workers hold in place of prefills that have ended."""
        settled_s = self._now() - SETTLE_S
        held = await self._held()
        if held is None:
            return
        self._known_held = held
        self._reservations = {
            each for each in self._reservations if each.ended_s is None or each.ended_s > settled_s
        }
