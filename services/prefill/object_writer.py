"""The prefill side of the carrier `object_ref`: KV into Ray's object store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import ray

from ..core.errors import KvTransferError
from ..core.types import Ticket
from ..kv.leases import UNCLAIMED_S
from ..kv.object_ref.stream import KvCollector
from ..kv.tls import TlsSource

logger = logging.getLogger(__name__)

KvReference: TypeAlias = ray.ObjectRef  # of a KvObject


class KvObjects:
    """Makes objects of what an engine's workers hold."""

    def __init__(self, tls: TlsSource | None) -> None:
        self._collector = KvCollector(tls)

    def close(self) -> None:
        """Hang up."""
        self._collector.close()

    @asynccontextmanager
    async def start_storing(self) -> AsyncIterator[PendingStore]:
        """Yield one request's `PendingStore`; what it has started ends with it."""
        storing = PendingStore(self)
        try:
            yield storing
        finally:
            storing.cancel()

    async def store(self, ticket: Ticket, timeout_s: float) -> list[KvReference]:
        """Put one object per worker. Empty when a worker did not give its KV.

        The objects belong to this process and die with it; the decode engine then computes the
        prompt itself. Whoever takes them refers to them by then, so the list is emptied after
        UNCLAIMED_S: the frames of a call that was cancelled may wait for the garbage collector,
        and would keep the KV meanwhile. The lease stays as it is.
        """
        ranks = range(len(ticket.endpoints))
        stored = (asyncio.to_thread(self._put, ticket, rank, timeout_s) for rank in ranks)
        try:
            objects = list(await asyncio.gather(*stored))
        except KvTransferError as error:
            logger.warning("lease_id=%s not stored: %s", ticket.lease.id, error)
            return []
        asyncio.get_running_loop().call_later(UNCLAIMED_S, objects.clear)
        return objects

    def _put(self, ticket: Ticket, rank: int, timeout_s: float) -> KvReference:
        with self._collector.collect(ticket, rank, timeout_s) as kv:
            return ray.put(kv)


class PendingStore:
    """One request's KV, asked for while it is computed: the answer then waits for the rest only."""

    def __init__(self, objects: KvObjects) -> None:
        self._objects = objects
        self._task: asyncio.Task[list[KvReference]] | None = None

    def start(self, ticket: Ticket, timeout_s: float) -> asyncio.Task[list[KvReference]]:
        """Ask the workers; they answer when the KV is complete."""
        self._task = asyncio.create_task(self._objects.store(ticket, timeout_s))
        return self._task

    async def objects(self, ticket: Ticket, timeout_s: float) -> list[KvReference]:
        """See `KvObjects.store`; the KV is complete, so it is waited for `timeout_s` only."""
        task = self._task or self.start(ticket, timeout_s)
        try:
            return await asyncio.wait_for(task, timeout_s)
        except TimeoutError:
            logger.warning("lease_id=%s not stored within %g s", ticket.lease.id, timeout_s)
            return []

    def cancel(self) -> None:
        """Give up what is under way."""
        if self._task is not None:
            self._task.cancel()
