"""Builds the gate of a gateway: its configuration, and its share of the engines."""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from ...config import GatewayConfig
from ...control.admitting import AdmissionGate, AdmittingPipeline
from ...control.gate import Gate
from ...control.gateway_share import GatewayShare
from ...control.shared_gate import View
from ...control.stages import StageModels
from ...core.pipeline import Pipeline
from ...core.ports import Answerer
from ...core.request_spans import Tracer
from .gate_actor import admission_policy, connect_to_gate
from .gate_client import SharedAdmission
from .health import DECODE, GATEWAY, PREFILL, SPECULATOR, PoolCounts

logger = logging.getLogger(__name__)


class EngineCounts:
    """Returns the newest known counts at once, and starts to read newer ones."""

    def __init__(self, count: PoolCounts, decode_seqs: int) -> None:
        """`decode_seqs`: sequences that a decode replica runs at once; 0: not known."""
        self._count = count
        self._decode_seqs = decode_seqs
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
        slots = self._decode_seqs * counts[DECODE]
        self._known = GatewayShare(counts[SPECULATOR], counts[PREFILL], counts[GATEWAY], slots)


class AdmissionControl:
    """A pipeline behind admission control, where a gateway's configuration has one."""

    def __init__(
        self,
        pipeline: Pipeline,
        config: GatewayConfig,
        models: StageModels,
        count: PoolCounts,
        tracer: Tracer,
        *,
        app_name: str,
        gateway: str,
        decode_seqs: int = 0,
    ) -> None:
        """`decode_seqs`: see `EngineCounts`."""
        self.answerer: Answerer = pipeline
        self.gate: AdmissionGate | None = None
        self._shared: SharedAdmission | None = None
        admission = config.admission
        if admission is None or admission.ttft_s is None:
            return
        ttft_s, fair_keys = admission.ttft_s, len(config.api_keys) > 1
        engines = EngineCounts(count, decode_seqs)
        gate: AdmissionGate = Gate(
            admission_policy(admission, ttft_s),
            per_engine=admission.per_engine,
            fair_keys=fair_keys,
            curves=models.curves,
            engines=engines,
            now=time.monotonic,
        )
        if admission.shared:
            connect = partial(connect_to_gate, app_name, admission, ttft_s, fair_keys)
            view = partial(_view, models, engines)
            gate = self._shared = SharedAdmission(connect, gate, gateway, view, time.monotonic)
        self.gate = gate
        self.answerer = AdmittingPipeline(pipeline, gate, admission.keep_floor, tracer)

    def start(self) -> None:
        """Look for the other gateways' gate, in the background."""
        if self._shared is not None:
            self._shared.start()

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._shared is not None:
            await self._shared.close()


def _view(models: StageModels, engines: EngineCounts) -> View:
    return View(models.curves(), engines())
