"""Reads a stream ahead in a task of its own, and hands over what has come since.

Two things come of it. All streams of a process are read, and then all are written: code that runs
for many streams in a row is in the processor's caches. And a reader that is behind takes
several items at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from types import TracebackType
from typing import Generic, Self, TypeVar

Item = TypeVar("Item")

MOST_AHEAD = 256  # items: a reader that does not read holds its stream back


class ReadAhead(Generic[Item]):
    """Holds a stream while inside: leaving closes it, read to its end or not."""

    def __init__(self, items: AsyncGenerator[Item], most: int = MOST_AHEAD) -> None:
        self._items = items
        self._most = most
        self._ready: list[Item] = []
        self._reading: asyncio.Task[None] | None = None
        self._news: asyncio.Future[None] | None = None  # for who waits for an item or the end
        self._room: asyncio.Future[None] | None = None  # for the stream, where too much is ready

    async def __aenter__(self) -> Self:
        self._reading = asyncio.create_task(self._read())
        self._reading.add_done_callback(lambda _task: _wake(self._news))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def take(self) -> list[Item]:
        """Return what has come since the last call, at least one item; [] at the end.

        Raises what the stream raises, once everything before that was taken.
        """
        reading = self._reading
        if reading is None:
            raise RuntimeError("a stream is read inside its context")
        if not self._ready and not reading.done():
            self._news = asyncio.get_running_loop().create_future()
            await self._news
        taken, self._ready = self._ready, []
        _wake(self._room)
        if not taken:
            reading.result()
        return taken

    async def _read(self) -> None:
        async with aclosing(self._items) as items:
            async for item in items:
                self._ready.append(item)
                _wake(self._news)
                while len(self._ready) >= self._most:
                    self._room = asyncio.get_running_loop().create_future()
                    await self._room


def _wake(waiting: asyncio.Future[None] | None) -> None:
    if waiting is not None and not waiting.done():
        waiting.set_result(None)
