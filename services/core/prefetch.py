"""An asynchronous iterator whose first item is awaited in the background."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

Item = TypeVar("Item")


@asynccontextmanager
async def prefetch_first(items: AsyncGenerator[Item]) -> AsyncIterator[AsyncGenerator[Item]]:
    """Start awaiting the first of `items` at once; close them on exit, started or not."""
    first = asyncio.ensure_future(anext(items))

    async def all_items() -> AsyncGenerator[Item]:
        try:
            item = await first
        except StopAsyncIteration:
            return
        yield item
        async for item in items:
            yield item

    async with aclosing(items):
        try:
            yield all_items()
        finally:
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
