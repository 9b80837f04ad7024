"""Bounds the time of a whole stream, with one timer for all of its items."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from types import TracebackType
from typing import Any, Self, TypeVar

T = TypeVar("T")


class StreamTimeout:
    """Ends the wait for a stream's next item once the stream's time is over.

    As `asyncio.timeout` around each wait, which would set and drop a timer for every item. Only a
    wait is ended: what the caller does between two items is not its concern.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._timer: asyncio.TimerHandle | None = None
        self._waiting: asyncio.Task[Any] | None = None
        self._cancelling = 0  # requests to cancel the task before it began to wait
        self._is_over = False

    def __enter__(self) -> Self:
        self._timer = asyncio.get_running_loop().call_later(self._seconds, self._end)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()

    async def wait(self, item: Awaitable[T]) -> T:
        """Return the item. Raises TimeoutError, and whatever `item` raises."""
        if self._time_is_over():
            raise TimeoutError
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a stream is read in a task")
        self._waiting, self._cancelling = task, task.cancelling()
        try:
            return await item
        except asyncio.CancelledError:
            if self._time_is_over() and task.uncancel() <= self._cancelling:
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def _time_is_over(self) -> bool:
        return self._is_over

    def _end(self) -> None:
        self._is_over = True
        if self._waiting is not None:
            self._waiting.cancel()
