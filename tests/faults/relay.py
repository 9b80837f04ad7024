"""A TCP relay that can hurt what passes: flip a byte, cut the stream, or hold it back."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

Hurt = Callable[[bytes, int], bytes | None]  # (piece, bytes before it) -> piece; None: cut


def untouched(piece: bytes, _before: int) -> bytes:
    """Let everything pass."""
    return piece


def flip_at(place: int) -> Hurt:
    """Flip one bit of the byte at `place` of the stream."""

    def hurt(piece: bytes, before: int) -> bytes:
        if before <= place < before + len(piece):
            changed = bytearray(piece)
            changed[place - before] ^= 0x10
            return bytes(changed)
        return piece

    return hurt


def cut_after(count: int) -> Hurt:
    """Close the connection once `count` bytes have passed."""
    return lambda piece, before: None if before + len(piece) > count else piece


@dataclass
class Relay:
    """Between a puller and a prefill worker."""

    target: str
    hurt: Hurt = untouched
    address: str = ""
    passed: int = 0
    reached: asyncio.Event = field(default_factory=asyncio.Event)  # a puller has connected

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection."""
        host, port = self.target.rsplit(":", 1)
        up_reader, up_writer = await asyncio.open_connection(host, int(port))
        self.reached.set()
        up = asyncio.create_task(self._copy(reader, up_writer, untouched))
        try:
            await self._copy(up_reader, writer, self.hurt)
        finally:
            up.cancel()
            up_writer.close()
            writer.close()

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, hurt: Hurt
    ) -> None:
        passed = 0
        while piece := await reader.read(1 << 16):
            changed = hurt(piece, passed)
            if changed is None:
                return
            passed += len(piece)
            self.passed = max(self.passed, passed)
            writer.write(changed)
            await writer.drain()


@asynccontextmanager
async def relay(target: str, hurt: Hurt = untouched) -> AsyncIterator[Relay]:
    """A relay to `target`, `host:port`, on a port of its own."""
    one = Relay(target, hurt)
    server = await asyncio.start_server(one.serve, "127.0.0.1", 0)
    one.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield one
    finally:
        server.close()
