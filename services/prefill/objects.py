"""The prefill side of the carrier `object_ref`: KV into Ray's object store."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeAlias

import ray

from ..errors import KvTransferError
from ..kv.objects import KvCollector
from ..kv.tls import MutualTls
from ..types import Ticket

logger = logging.getLogger(__name__)

KvReference: TypeAlias = ray.ObjectRef  # of a KvObject


class KvObjects:
    """Makes objects of what an engine's workers hold."""

    def __init__(self, tls: MutualTls | None) -> None:
        self._collector = KvCollector(tls)

    def close(self) -> None:
        """Hang up."""
        self._collector.close()

    async def store(self, ticket: Ticket, timeout_s: float) -> list[KvReference]:
        """One object per worker. Empty when a worker did not give its KV.

        The objects belong to this process and die with it; the decode engine then computes the
        prompt itself. The references in the list last as long as the task that asked: the
        frames of a task that was cancelled may wait for the garbage collector, and would keep
        the KV meanwhile. The lease stays as it is.
        """
        ranks = range(len(ticket.endpoints))
        stored = (asyncio.to_thread(self._put, ticket, rank, timeout_s) for rank in ranks)
        try:
            objects = list(await asyncio.gather(*stored))
        except KvTransferError as error:
            logger.warning("lease_id=%s not stored: %s", ticket.lease_id, error)
            return []
        asking = asyncio.current_task()
        if asking is not None:
            asking.add_done_callback(lambda _task: objects.clear())
        return objects

    def _put(self, ticket: Ticket, rank: int, timeout_s: float) -> KvReference:
        with self._collector.collected(ticket, rank, timeout_s) as kv:
            return ray.put(kv)
