"""An asynchronous iterator whose first item is awaited in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")


class Prefetched(AsyncGenerator[Item]):
    """The items, the first of which is awaited already; the others cost no more for it."""

    def __init__(self, items: AsyncGenerator[Item], first: asyncio.Future[Item]) -> None:
        self._items = items
        self._prefetched = first
        self._first: asyncio.Future[Item] | None = first

    async def peek(self) -> Item | None:
        """Wait for the first item, which is still to be read; None if there is none or it failed.

        Reading it raises what failed.
        """
        await asyncio.wait((self._prefetched,))
        failed = self._prefetched.cancelled() or self._prefetched.exception() is not None
        return None if failed else self._prefetched.result()

    def __anext__(self) -> Any:
        first, self._first = self._first, None
        return anext(self._items) if first is None else first

    def asend(self, value: None) -> Any:
        """Return the next item: no value is sent."""
        del value
        return self.__anext__()

    def athrow(self, *error: Any) -> Any:
        """Raise an error in the items."""
        return self._items.athrow(*error)

    async def aclose(self) -> None:
        """Close the items once their first was read; until then whoever prefetches does."""
        if self._first is None and self._prefetched.done():
            await self._items.aclose()


@asynccontextmanager
async def prefetch_first(items: AsyncGenerator[Item]) -> AsyncIterator[Prefetched[Item]]:
    """Start awaiting the first of `items` at once; close them on exit, started or not."""
    first = asyncio.ensure_future(anext(items))
    async with aclosing(items):
        try:
            yield Prefetched(items, first)
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
