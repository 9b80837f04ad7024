"""A decode engine as a Serve replica: bytes in, a stream of bytes out."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from ray.util import get_node_ip_address

from ..autoscaling.signals import DECODE_SLOTS, KV_TOKENS
from ..config import EnginesConfig
from ..core import heap
from ..core.dead_replica import ends_when_dead
from ..core.replica_logging import log_call, log_with_serve
from ..core.types import DecodeStep, Replay, Request, Selection, Ticket
from ..core.wire import pack, unpack
from ..engine.fork_server import FORK_SERVER
from ..kv.nixl.agent import require
from ..kv.tls import watch_tls
from .object_reader import KvReference, ObjectTickets
from .stream_gauge import StreamGauge

logger = logging.getLogger(__name__)

_Asked = tuple[Request, Selection, Ticket | None, Replay, float]
_KIND = cast("type[_Asked]", _Asked)


class DecodeReplica:
    """Serve awaits the constructor, checks the health, and calls `__del__` after draining."""

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        log = log_with_serve()
        config = EnginesConfig.model_validate_json(config_json)
        require(config.kv.carrier)
        tls = watch_tls(config.kv.tls)
        if config.decode.fork_engine:
            FORK_SERVER.start()
        from .assembly import assemble  # vLLM: imported here while the server imports it as well

        self._service = assemble(config)
        await self._service.start()
        log.reopen()
        logger.info("kv carrier: %s", await self._service.carrier())
        host = get_node_ip_address() if config.kv.host is None else config.kv.host
        self._tickets = ObjectTickets(host, tls)
        self._streams = StreamGauge()
        self._gauge = asyncio.create_task(self._streams.run())
        heap.freeze()

    async def __del__(self) -> None:
        self._gauge.cancel()
        self._tickets.close()
        await self._service.close()

    def record_replica_metadata(self) -> dict[str, int]:
        """Return the metadata that the gateways' routers use."""
        return {"prefix_cache_tokens": self._service.prefix_cache_tokens()}

    async def decode(
        self, payload: bytes, load: bytes, objects: list[KvReference]
    ) -> AsyncGenerator[bytes]:
        """Take `(Request, Selection, Ticket | None, Replay, timeout_s)`; stream DecodeStep.

        `load` is for the router, which chose this replica by it. `objects` hold the ticket's KV,
        one per rank, if Ray carries it.
        """
        del load
        request, selection, ticket, replay, timeout_s = unpack(payload, _KIND)
        with (
            self._streams.track(),
            ends_when_dead(self._is_dead),
            log_call(logger, "decode", request.request_id) as pairs,
        ):
            pairs |= {"output_tokens": 0, "open_samples": request.samples}
            async with self._tickets.make_local(ticket, objects) as local:
                steps = self._service.decode(request, selection, local, replay, timeout_s)
                async with aclosing(steps) as stream:
                    async for step in stream:
                        _count_step(pairs, step)
                        yield pack(step)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the replica's input to the autoscaling policy."""
        slots, tokens = self._service.max_num_seqs, self._service.kv_tokens
        return {DECODE_SLOTS: float(slots), KV_TOKENS: float(tokens)}

    async def check_health(self) -> None:
        """End this process when the engine's is dead."""
        with ends_when_dead(self._is_dead):
            await self._service.check_health()

    def _is_dead(self) -> bool:
        return self._service.is_dead


def _count_step(pairs: dict[str, Any], step: DecodeStep) -> None:
    """Add a step to the request's log line."""
    pairs["output_tokens"] += len(step.chunk.token_ids)
    pairs["open_samples"] -= step.chunk.is_finished
    if pairs["open_samples"] == 0:
        pairs["outcome"] = "finished"
    if step.transfer_s is not None:
        pairs |= {"transfer_s": step.transfer_s, "recomputed": step.recomputed}
