"""Request bodies: bounded in time, in size, and all together."""

import asyncio

import pytest
from starlette.datastructures import Headers

from specprefill.core.errors import Overloaded
from specprefill.gateway.openai.bodies import BodyReader, BodyTooLarge, BodyTooSlow, Disconnected

NO_HEADERS = Headers()


def reader(shed=None, **more):
    limits = {"max_bytes": 1000, "timeout_s": 5.0, "max_buffered_bytes": 5000, **more}
    return BodyReader(**limits, on_shed=(shed if shed is not None else []).append)


def sends(*parts, ends=True):
    """An ASGI receive that gives these parts, then ends the body or sends nothing more."""
    pending = list(parts)

    async def receive():
        if not pending:
            await asyncio.Event().wait()
        part = pending.pop(0)
        return {"type": "http.request", "body": part, "more_body": bool(pending) or not ends}

    return receive


async def test_the_parts_become_one_body():
    bodies = reader()
    assert await bodies.read(NO_HEADERS, sends(b"ab", b"", b"c")) == b"abc"
    assert bodies.buffered_bytes == 0


async def test_a_body_that_stops_half_way_is_too_slow():
    bodies = reader(timeout_s=0.05)
    with pytest.raises(BodyTooSlow):
        await bodies.read(NO_HEADERS, sends(b"ab", ends=False))
    assert bodies.buffered_bytes == 0


async def test_a_body_that_keeps_coming_is_given_time():
    """Of 200 kB, two more seconds than its time limit."""
    part, more = b"x" * 100_000, iter([True, True, False])
    waits_s = iter([0.0, 0.6, 0.6])

    async def receive():
        await asyncio.sleep(next(waits_s))
        return {"type": "http.request", "body": part, "more_body": next(more)}

    bodies = reader(timeout_s=0.5, max_bytes=1 << 20, max_buffered_bytes=1 << 20)
    assert await bodies.read(NO_HEADERS, receive) == 3 * part


@pytest.mark.parametrize("headers", [Headers(), Headers({"content-length": "1001"})])
async def test_a_body_over_the_limit_is_refused_declared_or_not(headers):
    with pytest.raises(BodyTooLarge):
        await reader().read(headers, sends(b"x" * 1001))


async def test_incomplete_bodies_together_are_bounded():
    shed = []
    bodies = reader(shed, max_buffered_bytes=1500)
    waiting = asyncio.create_task(bodies.read(NO_HEADERS, sends(b"x" * 900, ends=False)))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded) as caught:
        await bodies.read(NO_HEADERS, sends(b"x" * 900))
    assert caught.value.reason == "bodies_full"
    assert shed == ["bodies_full"]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert bodies.buffered_bytes == 0


async def test_a_client_that_leaves_ends_the_reading():
    async def receive():
        return {"type": "http.disconnect"}

    with pytest.raises(Disconnected):
        await reader().read(NO_HEADERS, receive)
