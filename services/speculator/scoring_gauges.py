"""Work of a speculator replica, as Serve metrics (`ray_specprefill_speculator_*`)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

from ..core.rising import RisingTotal

if TYPE_CHECKING:  # importing torch takes seconds
    from .service import SpeculatorService
    from .words_service import WordsService

_PERIOD_S = 1.0
_TOTALS = {  # field of `Counts` -> metric and description
    "prompts": ("prompts_total", "Prompts that were scored"),
    "repeats": ("repeated_prompts_total", "Prompts whose scores were remembered"),
    "batches": ("batches_total", "Batches of prompts that looked ahead together"),
    "tokens": ("tokens_total", "Tokens of scored prompts, as the draft model counts them"),
    "cached_tokens": ("cached_tokens_total", "Tokens whose keys and values were remembered"),
    "read_s": ("read_seconds_total", "Seconds spent reading prompts"),
    "look_ahead_s": ("look_ahead_seconds_total", "Seconds spent on look-ahead"),
    "queue_s": ("queue_seconds_total", "Seconds that scored prompts waited"),
    "timeouts": ("timeouts_total", "Prompts that were not scored in time"),
    "shed": ("shed_total", "Prompts that found the queue full"),
    "failures": ("failures_total", "Passes that failed"),
}


class SpeculatorGauges:
    """Reads the service once a second, until cancelled. `make` is as `ray.serve.metrics`."""

    def __init__(self, service: SpeculatorService | WordsService, make: Any = metrics) -> None:
        def gauge(name: str, description: str) -> Any:
            return make.Gauge(f"specprefill_speculator_{name}", description=description)

        self._service = service
        self._queued = gauge("queued", "Prompts in the queue")
        self._scoring = gauge("scoring", "Prompts that are being read or look ahead")
        self._remembered = gauge(
            "remembered_bytes", "Keys and values of earlier prompts that are remembered"
        )
        self._memory = gauge(
            "memory_bytes", "Room for keys and values: `speculator.kv_memory_bytes`"
        )
        self._self_test = gauge(
            "self_test",
            "Share of generated facts that are kept; below 0.6 prompts are pruned only on request",
        )
        self._facts_kept: float | None = None
        self._totals = {
            field: RisingTotal(
                make.Counter(f"specprefill_speculator_{name}", description=description)
            )
            for field, (name, description) in _TOTALS.items()
        }

    async def run(self) -> None:
        """Keep the metrics up to date."""
        while True:
            self.update()
            await asyncio.sleep(_PERIOD_S)

    def record_self_test(self, facts_kept: float) -> None:
        """Set the result of the self-test, which has ended."""
        self._facts_kept = facts_kept

    def update(self) -> None:
        """Set every metric to the service's current value."""
        if self._facts_kept is not None:  # Ray forgets a gauge that is not set again
            self._self_test.set(self._facts_kept)
        self._queued.set(self._service.queue_length)
        self._scoring.set(self._service.batch_size)
        self._remembered.set(self._service.remembered_bytes)
        self._memory.set(self._service.memory_bytes)
        for field, total in self._totals.items():
            total.follow(getattr(self._service.counts, field))
