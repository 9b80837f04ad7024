"""A stream that is read ahead of its reader."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from specprefill.core.read_ahead import ReadAhead


class Numbers:
    """Yields numbers, each once it may, and knows how far it has come and how it ended."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self._count, self._error = count, error
        self.may = asyncio.Semaphore(0)
        self.yielded = 0
        self.closed = False

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.may.release()

    async def stream(self) -> AsyncGenerator[int]:
        try:
            for number in range(self._count):
                await self.may.acquire()
                self.yielded += 1
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_what_has_come_is_taken_at_once():
    numbers = Numbers(6)
    async with ReadAhead(numbers.stream()) as ahead:
        numbers.allow(1)
        assert await ahead.take() == [0]
        numbers.allow(3)
        await settle()
        assert await ahead.take() == [1, 2, 3]
        waiting = asyncio.create_task(ahead.take())
        await settle()
        assert not waiting.done()
        numbers.allow(2)
        assert await waiting + await ahead.take() == [4, 5]
        assert await ahead.take() == []
        assert await ahead.take() == []
    assert numbers.closed


async def test_an_error_comes_after_what_was_before_it():
    numbers = Numbers(2, ValueError("broken"))
    async with ReadAhead(numbers.stream()) as ahead:
        numbers.allow(2)
        await settle()
        assert await ahead.take() == [0, 1]
        with pytest.raises(ValueError, match="broken"):
            await ahead.take()


async def test_an_error_wakes_who_waits():
    async with ReadAhead(Numbers(0, ValueError("broken")).stream()) as ahead:
        with pytest.raises(ValueError, match="broken"):
            await ahead.take()


async def test_leaving_closes_the_stream():
    numbers = Numbers(9)
    async with ReadAhead(numbers.stream()) as ahead:
        numbers.allow(1)
        assert await ahead.take() == [0]
        assert not numbers.closed
    assert numbers.closed


async def test_a_cancelled_reader_closes_the_stream():
    numbers = Numbers(9)

    async def read() -> None:
        async with ReadAhead(numbers.stream()) as ahead:
            while await ahead.take():
                pass

    reader = asyncio.create_task(read())
    await settle()
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    assert numbers.closed


async def test_a_reader_that_does_not_read_holds_the_stream_back():
    numbers = Numbers(9)
    async with ReadAhead(numbers.stream(), most=3) as ahead:
        numbers.allow(9)
        await settle()
        assert numbers.yielded == 3
        taken = await ahead.take()
        await settle()
        assert numbers.yielded == 6
        while more := await ahead.take():
            taken += more
        assert taken == list(range(9))


async def test_many_streams_are_read_before_any_is_written():
    order: list[str] = []
    tick = asyncio.Event()

    async def stream(name: str) -> AsyncGenerator[str]:
        await tick.wait()
        order.append(f"read {name}")
        yield name

    async def write(name: str) -> None:
        async with ReadAhead(stream(name)) as ahead:
            while await ahead.take():
                order.append(f"wrote {name}")

    writers = [asyncio.create_task(write(name)) for name in "abc"]
    await settle()
    tick.set()
    await asyncio.gather(*writers)
    assert order == ["read a", "read b", "read c", "wrote a", "wrote b", "wrote c"]
