"""The speculator as a Serve replica: bytes in, bytes out."""

from __future__ import annotations

import asyncio
import logging
import os
import time

from ..autoscaling.signals import QUEUE_AGE_S
from ..autoscaling.waiting import Waiting
from ..config import AppConfig
from ..control.from_config import kv_block_tokens
from ..core import heap
from ..core.dead_replica import ends_when_dead
from ..core.errors import SpeculatorUnavailable
from ..core.plan import can_choose, is_asked
from ..core.replica_logging import log_call, log_with_serve
from ..core.request_spans import SpanKind, consecutive_parts
from ..core.types import Plan, Reason, Request, Selection, dense_selection
from ..core.wire import pack, unpack
from ..tracing.environment import tracer_for
from .scoring_gauges import SpeculatorGauges

logger = logging.getLogger(__name__)


class SpeculatorReplica:
    """Serve awaits the constructor, checks the health, and calls `__del__` after draining.

    The constructor imports torch, which takes seconds: whoever builds the application need not.
    """

    async def __init__(self, config_json: str) -> None:  # type: ignore[misc]
        from .service import SpeculatorService
        from .words_service import WordsService

        log_with_serve()
        config = AppConfig.model_validate_json(config_json)
        by_model = config.speculator.reads_with_model
        service = SpeculatorService if by_model else WordsService
        self._service = service.from_config(
            config.speculator,
            config.selection,
            config.model.path,
            kv_block_tokens(config.prefill),
        )
        self._waiting = Waiting(time.monotonic)
        self._tracer = tracer_for("speculator", os.environ)
        await self._service.start()
        heap.freeze()
        self._gauges = SpeculatorGauges(self._service)
        self._tasks = [asyncio.create_task(self._gauges.run())]
        self._facts_kept: float | None = None  # of the self-test; None: not known
        if config.speculator.self_test and not config.speculator.random_weights:
            self._tasks.append(asyncio.create_task(self._test(config.model.path)))

    async def __del__(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._service.close()

    def record_replica_metadata(self) -> dict[str, int]:
        """Return the metadata that the gateways' routers use."""
        return {"prefix_cache_tokens": self._service.prefix_cache_tokens}

    async def select(self, payload: bytes, load: bytes = b"") -> bytes:
        """Take `(Request, Plan, timeout_s)`; return Selection.

        `load` is for the router, which chose this replica by it.
        """
        del load
        request, plan, timeout_s = unpack(payload, tuple[Request, Plan, float])
        if not can_choose(self._facts_kept) and not is_asked(request.controls):
            return pack(dense_selection(len(request.prompt), Reason.SPECULATOR_UNFIT))
        with self._waiting.track(), ends_when_dead(self._is_dead):
            return pack(await self._select(request, plan, timeout_s))

    async def _select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """Select, with a span and a log line."""
        with (
            self._tracer.start_within("speculator.select", request.trace, SpanKind.SERVER) as span,
            log_call(logger, "speculator", request.request_id) as pairs,
        ):
            started_s = time.monotonic()
            selection = await self._service.select(request, plan, timeout_s)
            pairs |= {
                "kept_tokens": selection.kept_tokens,
                "queue_s": selection.queue_s,
                "speculate_s": selection.speculate_s,
            }
            stages = (
                ("speculator.queue", selection.queue_s),
                ("speculator.score", selection.speculate_s),
            )
            for stage in consecutive_parts(started_s, *stages):
                span.record(stage)
            return selection

    async def self_test(self) -> float | None:
        """Return the share of generated facts that the speculator keeps; None: not known."""
        return self._facts_kept

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the replica's input to the autoscaling policy."""
        return {QUEUE_AGE_S: self._waiting.oldest_s()}

    async def check_health(self) -> None:
        """End this process when the serving loop has failed."""
        with ends_when_dead(self._is_dead):
            if not self._service.is_running:
                raise SpeculatorUnavailable("speculator: not running")

    def _is_dead(self) -> bool:
        return self._service.has_failed

    async def _test(self, main_path: str) -> None:
        """Run the self-test in the background: the replica serves meanwhile."""
        from .self_test import self_test

        self._facts_kept = await self_test(self._service, main_path)
        if self._facts_kept is not None:
            self._gauges.record_self_test(self._facts_kept)
