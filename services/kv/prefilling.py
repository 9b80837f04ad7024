"""A prefill under way, and the lease that holds its KV: the port `Prefilling`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from ..core.types import PrefillResult, Ticket
from .holding import RemoteLeases, hold_lease


class HeldPrefill:
    """The answer of a prefill engine's service, and the lease behind its ticket."""

    def __init__(
        self,
        steps: AsyncIterator[Ticket | PrefillResult],
        leases: RemoteLeases,
        stack: AsyncExitStack,
    ) -> None:
        self._steps = steps
        self._leases = leases
        self._stack = stack
        self._prefilled: PrefillResult | None = None
        self._kv_arrived: asyncio.Event | None = None  # None: no lease is held

    async def ticket(self) -> Ticket | None:
        """See the port."""
        step = await anext(self._steps)
        if isinstance(step, Ticket):
            await self._hold(step)
            return step
        self._prefilled = step
        return None

    async def result(self) -> PrefillResult:
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
        """Start to renew the lease when the ticket first appears; later calls do nothing."""
        if self._kv_arrived is None:
            self._kv_arrived = await self._stack.enter_async_context(
                hold_lease(ticket, self._leases)
            )


@asynccontextmanager
async def hold_prefill(
    steps: AsyncIterator[Ticket | PrefillResult], leases: RemoteLeases
) -> AsyncIterator[HeldPrefill]:
    """Hold the KV while inside; at the end it is released, whatever has come by then."""
    async with AsyncExitStack() as stack:
        yield HeldPrefill(steps, leases, stack)
