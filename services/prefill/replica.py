"""A prefill engine as a Serve replica: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing

from ..autoscaling.signals import QUEUE_AGE_S
from ..autoscaling.waiting import Waiting
from ..config import EnginesConfig
from ..core import heap
from ..core.dead_replica import ends_when_dead
from ..core.replica_logging import log_call, log_with_serve
from ..core.types import PrefillResult, Request, Selection
from ..core.wire import pack, unpack
from ..engine.fork_server import FORK_SERVER
from ..kv.nixl.agent import require
from ..kv.tls import watch_tls
from .kv_gauges import KvGauges
from .object_writer import KvObjects, KvReference, PendingStore

logger = logging.getLogger(__name__)


class PrefillReplica:
    """Serve awaits the constructor, checks the health, and calls `__del__` after draining."""

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        log = log_with_serve()
        config = EnginesConfig.model_validate_json(config_json)
        require(config.kv.carrier)
        tls = watch_tls(config.kv.tls)
        if config.prefill.fork_engine:
            FORK_SERVER.start()
        from .assembly import assemble  # vLLM: imported here while the server imports it as well

        self._service = assemble(config, tls)
        self._objects = KvObjects(tls)
        self._kv = config.kv
        self._waiting = Waiting(time.monotonic)
        await self._service.start()
        log.reopen()
        heap.freeze()
        ports = ", ".join(self._service.kv_addresses)
        logger.info("kv carrier: %s; kv ports: %s", self._service.carrier, ports)
        self._gauges = asyncio.create_task(KvGauges(self._service).run())

    async def __del__(self) -> None:
        # Tickets that were handed out are still to be pulled; each ends by its lease at the latest.
        await self._service.drain(self._kv.lease_s)
        self._gauges.cancel()
        self._objects.close()
        await self._service.close()

    def record_replica_metadata(self) -> dict[str, int]:
        """Return the metadata that the gateways' routers use."""
        return {"prefix_cache_tokens": self._service.prefix_cache_tokens()}

    async def prefill(
        self, payload: bytes, load: bytes = b""
    ) -> AsyncGenerator[tuple[bytes, list[KvReference]]]:
        """Take `(Request, Selection, timeout_s)`; return PrefillSteps, and KV that Ray carries.

        What Ray carries cannot be pulled before it is whole: no ticket comes early, but the
        workers are asked for the KV. `load` is for the router, which chose this replica by it.
        """
        del load
        request, selection, timeout_s = unpack(payload, tuple[Request, Selection, float])
        with (
            self._waiting.track(),
            ends_when_dead(self._is_dead),
            log_call(logger, "prefill", request.request_id) as pairs,
        ):
            pairs["kept_tokens"] = selection.kept_tokens
            steps = self._service.steps(request, selection, timeout_s)
            async with aclosing(steps) as stream, self._objects.start_storing() as storing:
                async for step in stream:
                    if isinstance(step, PrefillResult):
                        pairs |= {
                            "outcome": "finished",
                            "queue_s": step.queue_s,
                            "prefill_s": step.prefill_s,
                        }
                        yield pack((None, step)), await self._store_kv(step, storing)
                    elif self._kv.carrier == "object_ref":
                        storing.start(step, self._kv.pull_timeout_s)
                    else:
                        yield pack((step, None)), []

    async def _store_kv(self, prefilled: PrefillResult, storing: PendingStore) -> list[KvReference]:
        """Return the KV as Ray's objects. Empty: it stays with the worker for decode to pull."""
        ticket = prefilled.ticket
        if ticket is None or ticket.tokens == 0 or self._kv.carrier != "object_ref":
            return []
        objects = await storing.objects(ticket, self._kv.pull_timeout_s)
        if objects:
            await self._service.release(ticket)  # the worker's copy is free at once
        return objects

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the replica's input to the autoscaling policy."""
        return {QUEUE_AGE_S: self._waiting.oldest_s()}

    async def check_health(self) -> None:
        """End this process when the engine's is dead."""
        with ends_when_dead(self._is_dead):
            await self._service.check_health()

    def _is_dead(self) -> bool:
        return self._service.is_dead
