"""An iterator that is begun before it is read."""

import asyncio

import pytest

from specprefill.core.begun import begun


class Source:
    """Yields `items`, raising those that are exceptions; tells when it began and ended."""

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
    async with begun(source.stream()) as items:
        await source.began.wait()
        assert [item async for item in items] == [1, 2, 3]
    assert source.ended


async def test_empty_stays_empty():
    async with begun(Source().stream()) as items:
        assert [item async for item in items] == []


@pytest.mark.parametrize("before", [(), (1,)])
async def test_a_failure_comes_where_it_would(before):
    async with begun(Source(*before, ValueError("late")).stream()) as items:
        for wanted in before:
            assert await anext(items) == wanted
        with pytest.raises(ValueError, match="late"):
            await anext(items)


async def test_what_is_not_read_is_closed():
    source = Source(1, 2)
    async with begun(source.stream()):
        await source.began.wait()
    assert source.ended


async def test_a_failure_that_nobody_reads_is_forgotten():
    async with begun(Source(ValueError("unread")).stream()):
        await asyncio.sleep(0)
