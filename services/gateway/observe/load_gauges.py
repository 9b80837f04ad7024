"""The load that a gateway holds now, as Serve metrics."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from ray.serve import metrics

from ...control.admitting import AdmissionGate

_PERIOD_S = 1.0


class LoadGauges:
    """Read once a second, until cancelled. `gate` None: no admission control."""

    def __init__(
        self, held: Callable[[], int], gate: AdmissionGate | None, make: Any = metrics
    ) -> None:
        def gauge(name: str, description: str) -> Any:
            return make.Gauge(f"specprefill_{name}", description=description)

        self._held = held
        self._gate = gate
        self._requests_held = gauge("requests_held", "Calls that the gateway holds, HTTP and gRPC")
        if gate is not None:
            self._waiting = gauge("admission_waiting", "Requests in the admission queue")
            self._admitted = gauge(
                "admission_admitted", "Requests that were admitted and have no first token yet"
            )
            self._shared = gauge(
                "admission_shared",
                "1 while the gate of all gateways decides, 0 while this one does by its part",
            )

    async def run(self) -> None:
        """Keep the gauges up to date: Ray forgets one that is not set again."""
        while True:
            self.update()
            await asyncio.sleep(_PERIOD_S)

    def update(self) -> None:
        """Set every gauge."""
        self._requests_held.set(self._held())
        if self._gate is not None:
            self._waiting.set(self._gate.waiting)
            self._admitted.set(self._gate.running)
            self._shared.set(float(self._gate.is_shared))
