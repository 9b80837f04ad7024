"""The decode side of the carrier `object_ref`: KV out of Ray's object store."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TypeAlias

import ray
from ray.exceptions import RayError

from ..core.types import Carrier, Ticket
from ..kv.object_ref.stream import KvObject, KvRelay
from ..kv.tls import TlsSource

logger = logging.getLogger(__name__)

KvReference: TypeAlias = ray.ObjectRef  # of a KvObject


class ObjectTickets:
    """Turns a ticket for objects into one that the engine's workers can pull from this node."""

    def __init__(self, host: str, tls: TlsSource | None = None) -> None:
        self._host = host
        self._tls = tls
        self._relays: list[KvRelay] = []

    def close(self) -> None:
        """Stop the relays."""
        for relay in self._relays:
            relay.stop()

    @asynccontextmanager
    async def make_local(
        self, ticket: Ticket | None, objects: list[KvReference]
    ) -> AsyncIterator[Ticket | None]:
        """Yield a ticket with which the objects can be pulled while inside.

        Objects whose owner has died leave the ticket as it is: its pull fails, and the
        engine computes the prompt.
        """
        if ticket is None or not objects:
            yield ticket
            return
        try:
            ranks: list[KvObject] = await asyncio.gather(*objects)
        except RayError as error:
            logger.warning("lease_id=%s lost: %s", ticket.lease.id, type(error).__name__)
            yield ticket
            return
        relays = self._relays_for(len(ranks))
        for relay, kv in zip(relays, ranks, strict=True):
            relay.offer(ticket, kv)
        try:
            addresses = tuple(relay.address for relay in relays)
            yield replace(ticket, endpoints=addresses, carrier=Carrier.GRPC)
        finally:
            for relay in relays:
                relay.withdraw(ticket)
            ranks.clear()  # frames that wait for the garbage collector must not keep the KV
            objects.clear()

    def _relays_for(self, ranks: int) -> list[KvRelay]:
        """Return one relay per rank, made when first needed."""
        while len(self._relays) < ranks:
            relay = KvRelay(self._host, self._tls)
            relay.start()
            self._relays.append(relay)
        return self._relays[:ranks]
