"""The prefill side of the carrier `object_ref`: KV into Ray's object store."""

from __future__ import annotations

import asyncio
import logging
from typing import TypeAlias

import ray

from ..errors import KvTransferError
from ..kv.objects import collect
from ..kv.tls import MutualTls
from ..types import Ticket

logger = logging.getLogger(__name__)

KvReference: TypeAlias = ray.ObjectRef  # of a KvObject


async def store(ticket: Ticket, timeout_s: float, tls: MutualTls | None) -> list[KvReference]:
    """One object per worker. Empty when a worker did not give its KV.

    The objects belong to this process and die with it; the decode engine then computes the
    prompt itself. The lease stays as it is.
    """
    try:
        objects = await asyncio.gather(
            *(
                asyncio.to_thread(collect, ticket, rank, timeout_s, tls)
                for rank in range(len(ticket.endpoints))
            )
        )
    except KvTransferError as error:
        logger.warning("lease_id=%s not stored: %s", ticket.lease_id, error)
        return []
    return [ray.put(kv) for kv in objects]
