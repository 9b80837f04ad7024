"""A prefill under way, and the lease that holds its KV: the port `Prefilling`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from ..core.types import Prefilled, Ticket
from .holding import RemoteLeases, held


class HeldPrefill:
    """What a prefill engine's service says, and the lease behind the ticket that it names."""

    def __init__(
        self, said: AsyncIterator[Ticket | Prefilled], leases: RemoteLeases, stack: AsyncExitStack
    ) -> None:
        self._said = said
        self._leases = leases
        self._stack = stack
        self._prefilled: Prefilled | None = None
        self._kv_arrived: asyncio.Event | None = None  # None: no lease is held

    async def ticket(self) -> Ticket | None:
        """See the port."""
        said = await anext(self._said)
        if isinstance(said, Ticket):
            await self._hold(said)
            return said
        self._prefilled = said
        return None

    async def result(self) -> Prefilled:
        """See the port."""
        while self._prefilled is None:
            await self.ticket()
        if self._prefilled.ticket is not None:
            await self._hold(self._prefilled.ticket)
        return self._prefilled

    def kv_arrived(self) -> None:
        """See the port."""
        if self._kv_arrived is not None:
            self._kv_arrived.set()

    async def _hold(self, ticket: Ticket) -> None:
        """From the first word of the ticket on, once."""
        if self._kv_arrived is None:
            self._kv_arrived = await self._stack.enter_async_context(held(ticket, self._leases))


@asynccontextmanager
async def prefilling(
    said: AsyncIterator[Ticket | Prefilled], leases: RemoteLeases
) -> AsyncIterator[HeldPrefill]:
    """While inside, the KV is held; at the end it is released, whatever was said by then."""
    async with AsyncExitStack() as stack:
        yield HeldPrefill(said, leases, stack)
