"""An iterator that is started before it is read."""

import asyncio
from contextlib import aclosing

import pytest

from specprefill.core.prefetch import prefetch_first


class Source:
    """Yields `items`, raising those that are exceptions; records when it started and ended."""

    def __init__(self, *items):
        self.items, self.began, self.ended = items, asyncio.Event(), False

    async def stream(self):
        try:
            for item in self.items:
                self.began.set()
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.ended = True


async def test_it_begins_at_once_and_yields_everything():
    source = Source(1, 2, 3)
    async with prefetch_first(source.stream()) as items:
        await source.began.wait()
        assert [item async for item in items] == [1, 2, 3]
    assert source.ended


async def test_empty_stays_empty():
    async with prefetch_first(Source().stream()) as items:
        assert [item async for item in items] == []


@pytest.mark.parametrize("before", [(), (1,)])
async def test_a_failure_comes_where_it_would(before):
    async with prefetch_first(Source(*before, ValueError("late")).stream()) as items:
        for wanted in before:
            assert await anext(items) == wanted
        with pytest.raises(ValueError, match="late"):
            await anext(items)


async def test_whoever_read_the_first_may_close_the_rest():
    source = Source(1, 2, 3)
    async with prefetch_first(source.stream()) as items:
        async with aclosing(items):
            assert await anext(items) == 1
        assert source.ended


async def test_an_unread_iterator_is_closed():
    source = Source(1, 2)
    async with prefetch_first(source.stream()):
        await source.began.wait()
    assert source.ended


async def test_an_unread_failure_is_ignored():
    async with prefetch_first(Source(ValueError("unread")).stream()):
        await asyncio.sleep(0)
