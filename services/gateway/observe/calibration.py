"""Measures the pools in the background, once they answer."""

from __future__ import annotations

import asyncio
import logging
import random

import msgspec
from vllm.sampling_params import SamplingParams

from ...control.probe import PrefillByDecoder, Probe
from ...control.stages import StageModels
from ...core.errors import SpecPrefillError
from ...core.pipeline import Pipeline
from ...core.ports import Prefiller
from ...core.types import Request

logger = logging.getLogger(__name__)

BUDGET_S = 0.5  # for each of the two pools
TIMEOUT_S = 60.0
PAUSE_S = 5.0  # before another attempt
ATTEMPTS = 60


class Calibration:
    """One probe, tried again while a pool does not answer."""

    def __init__(self, probe: Probe, models: StageModels) -> None:
        self._probe = probe
        self._models = models
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start in the background."""
        self._task = asyncio.create_task(self.run())

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def run(self) -> None:
        """Try until the pools were measured, at most `ATTEMPTS` times."""
        for _ in range(ATTEMPTS):
            try:
                await self._probe.run(self._models)
            except SpecPrefillError as error:
                logger.info("calibration: not yet: %s", error)
                await asyncio.sleep(PAUSE_S)
            else:
                logger.info("calibration: %s", self._models.curves())
                return


def calibration(
    pipeline: Pipeline, models: StageModels, vocabulary: int, max_model_len: int
) -> Calibration:
    """Return the calibration of `models` on the pools of `pipeline`.

    Their model has `vocabulary` tokens, and takes `max_model_len` of them.
    """
    prompts = ProbePrompts(vocabulary, random.Random())
    longest = max_model_len - 1  # one token is the answer
    prefiller: Prefiller = pipeline.prefiller
    if not models.hands_over:
        prefiller = PrefillByDecoder(pipeline.decoder)
    probe = Probe(pipeline.speculator, prefiller, prompts, longest, BUDGET_S, TIMEOUT_S)
    return Calibration(probe, models)


class ProbePrompts:
    """Requests for `Probe`: random tokens, so that no cache shortens a measurement."""

    def __init__(self, vocabulary: int, rng: random.Random) -> None:
        self._vocabulary = vocabulary
        self._rng = rng
        sampling = SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True)
        self._sampling = msgspec.msgpack.encode(sampling)

    def __call__(self, tokens: int) -> Request:
        """Return a request of `tokens` random tokens and one output token."""
        return Request(
            request_id=f"probe-{self._rng.getrandbits(48):x}",
            prompt=tuple(self._rng.randrange(self._vocabulary) for _ in range(tokens)),
            sampling=self._sampling,
            timeout_s=TIMEOUT_S,
        )
