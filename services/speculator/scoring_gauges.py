"""Work of a speculator replica, as Serve metrics (`ray_specprefill_speculator_*`)."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve import metrics

from .service import SpeculatorService

_PERIOD_S = 1.0
_TOTALS = {  # field of `Counts` -> metric and description
    "prompts": ("prompts_total", "Prompts that were scored"),
    "repeats": ("repeated_prompts_total", "Prompts whose scores were remembered"),
    "batches": ("batches_total", "Batches of prompts"),
    "tokens": ("tokens_total", "Tokens of scored prompts"),
    "cached_tokens": ("cached_tokens_total", "Tokens whose keys and values were remembered"),
    "read_s": ("read_seconds_total", "Reading prompts"),
    "look_ahead_s": ("look_ahead_seconds_total", "Looking ahead"),
    "queue_s": ("queue_seconds_total", "Waiting of scored prompts"),
    "timeouts": ("timeouts_total", "Prompts that were given up"),
    "shed": ("shed_total", "Prompts that found the queue full"),
    "failures": ("failures_total", "Batches that failed"),
}


class SpeculatorGauges:
    """Reads the service once a second, until cancelled. `make` is as `ray.serve.metrics`."""

    def __init__(self, service: SpeculatorService, make: Any = metrics) -> None:
        def gauge(name: str, description: str) -> Any:
            return make.Gauge(f"specprefill_speculator_{name}", description=description)

        self._service = service
        self._queued = gauge("queued", "Prompts that wait")
        self._scoring = gauge("scoring", "Prompts of the batch that is being scored")
        self._self_test = gauge("self_test", "Share of generated facts that the draft model keeps")
        self._facts_kept: float | None = None
        self._totals = {field: gauge(*named) for field, named in _TOTALS.items()}

    async def run(self) -> None:
        """Keep the metrics up to date."""
        while True:
            self.update()
            await asyncio.sleep(_PERIOD_S)

    def record_self_test(self, facts_kept: float) -> None:
        """Set the result of the self-test, which has ended."""
        self._facts_kept = facts_kept

    def update(self) -> None:
        """Set every gauge to the service's current value."""
        if self._facts_kept is not None:  # Ray forgets a gauge that is not set again
            self._self_test.set(self._facts_kept)
        self._queued.set(self._service.queue_length)
        self._scoring.set(self._service.batch_size)
        for field, gauge in self._totals.items():
            gauge.set(getattr(self._service.counts, field))
