"""Holds a ticket's lease on a remote worker: renews it while needed, releases it once."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Protocol

from ..core.errors import SpecPrefillError
from ..core.types import Ticket
from .leases import UNCLAIMED_S

logger = logging.getLogger(__name__)

RENEW_S = UNCLAIMED_S / 3


class RemoteLeases(Protocol):
    """The workers that hold the KV."""

    async def renew(self, ticket: Ticket) -> bool:
        """Restart the lease's time. False if it is gone."""
        ...

    async def release(self, ticket: Ticket) -> None:
        """Drop the lease. Idempotent."""
        ...


@asynccontextmanager
async def hold_lease(
    ticket: Ticket, leases: RemoteLeases, *, renew_s: float = RENEW_S
) -> AsyncIterator[asyncio.Event]:
    """Hold the lease while inside, or until the event is set: then the KV is not needed."""
    done = asyncio.Event()
    keeping = asyncio.create_task(_keep_lease(ticket, leases, renew_s, done))
    try:
        yield done
    finally:
        done.set()
        await asyncio.shield(keeping)


async def _keep_lease(
    ticket: Ticket, leases: RemoteLeases, renew_s: float, done: asyncio.Event
) -> None:
    """Renew and release in one task. Errors are only logged: the lease expires anyway."""
    try:
        while not await _set_within(done, renew_s):
            await leases.renew(ticket)
        await leases.release(ticket)
    except SpecPrefillError as error:
        logger.warning("lease_id=%s not released: %s", ticket.lease.id, error)


async def _set_within(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
