"""An answer on its way to the client: what breaks it comes after what was before."""

from collections.abc import AsyncGenerator

import pytest

from specprefill.core.errors import Unavailable
from specprefill.core.read_ahead import ReadAhead
from specprefill.core.types import Chunk, Request
from specprefill.gateway.observe.request_log import LoggedAnswer, RequestLog


async def pieces(*chunks: Chunk) -> AsyncGenerator[Chunk]:
    for chunk in chunks:
        yield chunk


@pytest.mark.parametrize(
    ("last", "message"),
    [
        ([Chunk(0, (), "", finish_reason="error")], "could not finish"),
        ([], "ended before it was complete"),
    ],
)
async def test_what_came_before_a_fault_is_taken_first(last, message):
    log = RequestLog(Request("r", (1, 2), b""))
    begun = (Chunk(0, (5,), "a"), Chunk(0, (6,), "b"))
    async with ReadAhead(pieces(*begun, *last)) as ahead:
        answer = LoggedAnswer(ahead, log)
        text = ""
        while text != "ab":
            text += "".join(chunk.text for chunk in await answer.take())
        with pytest.raises(Unavailable, match=message):
            await answer.take()
    assert log.output_tokens == 2


async def test_a_complete_answer_ends_with_nothing():
    log = RequestLog(Request("r", (1, 2), b""))
    async with ReadAhead(pieces(Chunk(0, (5,), "a", finish_reason="stop"))) as ahead:
        answer = LoggedAnswer(ahead, log)
        assert [chunk.text for chunk in await answer.take()] == ["a"]
        assert await answer.take() == ()
    assert log.open_samples == 0
