"""A prefill engine as a Serve replica: bytes in, bytes out."""

from __future__ import annotations

import asyncio

from .. import heap
from ..config import AppConfig
from ..engine.args import Role, engine_args
from ..engine.engine import Engine
from ..kv.tls import read_tls
from ..types import Request, Selection
from ..wire import pack, unpack
from .gauges import KvGauges
from .objects import KvReference, store
from .service import PrefillService


class PrefillReplica:
    """Serve awaits the constructor, checks the health, and calls `__del__` after draining."""

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        config = AppConfig.model_validate_json(config_json)
        self._tls = read_tls(config.kv.tls)
        args = engine_args(
            config.model, config.prefill, config.kv, Role.PREFILL, peer=config.decode
        )
        engine = Engine(args, cpu_threads=config.prefill.cpu_threads)
        self._service = PrefillService(engine, self._tls)
        self._kv = config.kv
        await self._service.start()
        heap.freeze()
        self._gauges = asyncio.create_task(KvGauges(self._service).run())

    async def __del__(self) -> None:
        # Tickets that were handed out are still to be pulled; each ends by its lease at the latest.
        await self._service.drain(self._kv.lease_s)
        self._gauges.cancel()
        await self._service.close()

    def record_replica_metadata(self) -> dict[str, int]:
        """What the gateways' routers know of this replica."""
        return {"prefix_cache_tokens": self._service.prefix_cache_tokens()}

    async def prefill(self, payload: bytes, load: bytes = b"") -> tuple[bytes, list[KvReference]]:
        """`(Request, Selection, timeout_s)` -> Prefilled, and its KV if Ray is to carry it.

        `load` is for the router, which chose this replica by it.
        """
        del load
        request, selection, timeout_s = unpack(payload, tuple[Request, Selection, float])
        prefilled = await self._service.prefill(request, selection, timeout_s)
        if prefilled.ticket is None or self._kv.carrier != "object_ref":
            return pack(prefilled), []
        objects = await store(prefilled.ticket, self._kv.pull_timeout_s, self._tls)
        return pack(prefilled), objects

    async def check_health(self) -> None:
        """Raises Unavailable when the engine process is dead."""
        await self._service.check_health()
