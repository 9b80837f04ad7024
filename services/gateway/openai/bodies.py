"""Reads request bodies, with limits on time, size and memory."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import Receive

from ...core.errors import Overloaded

LEAST_BYTES_PER_S = 100_000  # a body that arrives at this rate is never too slow
_RETRY_AFTER_S = 1.0
_REASON = "bodies_full"


class BodyTooLarge(Exception):
    """The body exceeds the limit."""


class BodyTooSlow(Exception):
    """The body stopped arriving."""


class Disconnected(Exception):
    """The client left before its body was complete."""


class BodyReader:
    """Reads the bodies of one gateway; `max_buffered_bytes` bounds those that are incomplete."""

    def __init__(
        self,
        max_bytes: int,
        timeout_s: float,
        max_buffered_bytes: int,
        on_shed: Callable[[str], None],
    ) -> None:
        self.max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._max_buffered_bytes = max_buffered_bytes
        self._on_shed = on_shed
        self.buffered_bytes = 0

    async def read(self, headers: Headers, receive: Receive) -> bytes:
        """Return the whole body. Raises BodyTooLarge, BodyTooSlow, Disconnected or Overloaded."""
        declared = headers.get("content-length", "0")
        if declared.isdigit() and int(declared) > self.max_bytes:
            raise BodyTooLarge
        body = bytearray()
        end_s = asyncio.get_running_loop().time() + self._timeout_s
        try:
            async with asyncio.timeout_at(end_s) as limit:
                while await self._read_part(body, receive):
                    limit.reschedule(end_s + len(body) / LEAST_BYTES_PER_S)
        except TimeoutError as error:
            raise BodyTooSlow from error
        finally:
            self.buffered_bytes -= len(body)
        return bytes(body)

    async def _read_part(self, body: bytearray, receive: Receive) -> bool:
        """Add the next part; return True if there is more to come."""
        message = await receive()
        if message["type"] == "http.disconnect":
            raise Disconnected
        part = message.get("body", b"")
        body += part
        self.buffered_bytes += len(part)
        if len(body) > self.max_bytes:
            raise BodyTooLarge
        if self.buffered_bytes > self._max_buffered_bytes:
            self._on_shed(_REASON)
            raise Overloaded("too many request bodies are arriving", _RETRY_AFTER_S, _REASON)
        return bool(message.get("more_body", False))
