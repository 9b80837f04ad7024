"""Builds the gate of a gateway: its configuration, and its share of the engines."""

from __future__ import annotations

import asyncio
import logging
import time

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ...config import GatewayConfig
from ...control.admission import AdmissionPolicy
from ...control.gate import AdmittingPipeline, Gate, GatewayShare
from ...control.stages import StageModels
from ...core.pipeline import Pipeline
from ...core.ports import Answerer
from ...core.request_spans import Tracer
from ..pools.health import GATEWAY, PREFILL, SPECULATOR, PoolCounts

logger = logging.getLogger(__name__)


class EngineCounts:
    """Returns the newest known counts at once, and starts to read newer ones."""

    def __init__(self, count: PoolCounts) -> None:
        self._count = count
        self._known = GatewayShare()
        self._reading: asyncio.Task[None] | None = None

    def __call__(self) -> GatewayShare:
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
        return self._known

    async def _read(self) -> None:
        try:
            counts = await self._count()
        except (
            RayError,
            RayServeException,
        ) as error:  # the controller is away: keep the last counts
            logger.info("replica counts: %s", error)
            return
        self._known = GatewayShare(counts[SPECULATOR], counts[PREFILL], counts[GATEWAY])


def gate_of(config: GatewayConfig, models: StageModels, count: PoolCounts) -> Gate | None:
    """Return the configured gate; None without admission control."""
    admission = config.admission
    if admission is None or admission.ttft_s is None:
        return None
    policy = AdmissionPolicy(
        admission.ttft_s,
        max_waiting=admission.max_waiting,
        max_waiting_per_key=admission.max_waiting_per_key,
    )
    return Gate(
        policy,
        keep_floor=admission.keep_floor,
        per_engine=admission.per_engine,
        fair_keys=len(config.api_keys) > 1,
        curves=models.curves,
        engines=EngineCounts(count),
        now=time.monotonic,
    )


def behind_gate(pipeline: Pipeline, gate: Gate | None, tracer: Tracer) -> Answerer:
    """Return the pipeline, behind the gate if there is one."""
    return pipeline if gate is None else AdmittingPipeline(pipeline, gate, tracer)
