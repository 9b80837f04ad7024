"""The speculator as a Serve replica: bytes in, bytes out."""

from __future__ import annotations

import time

from .. import heap
from ..autoscaling.signals import QUEUE_AGE_S
from ..autoscaling.waiting import Waiting
from ..config import AppConfig
from ..errors import SpeculatorUnavailable
from ..policies import kv_block_tokens
from ..replica_logging import log_with_serve
from ..types import Plan, Request
from ..wire import pack, unpack
from .service import SpeculatorService


class SpeculatorReplica:
    """Serve awaits the constructor, checks the health, and calls `__del__` after draining."""

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        log_with_serve()
        config = AppConfig.model_validate_json(config_json)
        self._service = SpeculatorService.from_config(
            config.speculator,
            config.selection,
            config.model.path,
            kv_block_tokens(config.prefill),
        )
        self._waiting = Waiting(time.monotonic)
        await self._service.start()
        heap.freeze()

    async def __del__(self) -> None:
        await self._service.close()

    async def select(self, payload: bytes) -> bytes:
        """`(Request, Plan, timeout_s)` -> Selection."""
        request, plan, timeout_s = unpack(payload, tuple[Request, Plan, float])
        with self._waiting.one():
            return pack(await self._service.select(request, plan, timeout_s))

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy is told of this replica."""
        return {QUEUE_AGE_S: self._waiting.oldest_s()}

    async def check_health(self) -> None:
        """Raises SpeculatorUnavailable when the serving loop has ended."""
        if not self._service.is_running:
            raise SpeculatorUnavailable("speculator: not running")
