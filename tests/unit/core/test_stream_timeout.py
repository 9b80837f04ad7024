"""One timer for a whole stream."""

import asyncio

import pytest

from specprefill.core.stream_timeout import StreamTimeout

SHORT_S, LONG_S = 0.5, 30.0


async def items(*delays_s):
    for place, delay_s in enumerate(delays_s):
        await asyncio.sleep(delay_s)
        yield place


async def test_items_pass():
    with StreamTimeout(LONG_S) as timeout:
        stream = items(0, 0)
        assert [await timeout.wait(anext(stream)) for _ in range(2)] == [0, 1]
        with pytest.raises(StopAsyncIteration):
            await timeout.wait(anext(stream))


async def test_a_wait_ends_with_the_time():
    with StreamTimeout(SHORT_S) as timeout:
        stream = items(0, LONG_S)
        await timeout.wait(anext(stream))
        with pytest.raises(TimeoutError):
            await timeout.wait(anext(stream))
    assert asyncio.current_task().cancelling() == 0
    await asyncio.sleep(0)  # nothing is left to be cancelled


async def test_time_that_passes_between_two_items_counts():
    with StreamTimeout(SHORT_S) as timeout:
        stream = items(0, 0)
        await timeout.wait(anext(stream))
        await asyncio.sleep(2 * SHORT_S)
        with pytest.raises(TimeoutError):
            await timeout.wait(anext(stream))
        await stream.aclose()


async def test_a_cancelled_reader_is_cancelled():
    async def read():
        with StreamTimeout(LONG_S) as timeout:
            await timeout.wait(anext(items(LONG_S)))

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("first", ["the caller", "the time"])
async def test_who_is_cancelled_as_the_time_ends_is_cancelled(first):
    with StreamTimeout(LONG_S) as timeout:
        task = asyncio.create_task(timeout.wait(anext(items(LONG_S))))
        await asyncio.sleep(0)
        ends = [task.cancel, timeout._end]
        for end in ends if first == "the caller" else reversed(ends):
            end()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert task.cancelling() == 1


async def test_the_first_item_may_be_awaited_by_another_task():
    with StreamTimeout(SHORT_S) as timeout:
        stream = items(0, LONG_S)
        assert await asyncio.create_task(timeout.wait(anext(stream))) == 0
        with pytest.raises(TimeoutError):
            await timeout.wait(anext(stream))


async def test_a_stream_that_ended_leaves_no_timer():
    with StreamTimeout(SHORT_S) as timeout:
        await timeout.wait(anext(items(0)))
    await asyncio.sleep(2 * SHORT_S)
    assert asyncio.current_task().cancelling() == 0


async def test_an_error_of_the_stream_comes_through():
    async def broken():
        raise ValueError("broken")
        yield

    with StreamTimeout(LONG_S) as timeout, pytest.raises(ValueError, match="broken"):
        await timeout.wait(anext(broken()))
