"""Requests that a decode replica streams, as a Serve metric (`ray_specprefill_decode_streams`)."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ray.serve import metrics

_PERIOD_S = 1.0


class StreamGauge:
    """Set once a second, until cancelled. `make` is as `ray.serve.metrics`."""

    def __init__(self, make: Any = metrics) -> None:
        self._streams = make.Gauge(
            "specprefill_decode_streams", description="Requests whose answers are being streamed"
        )
        self._running = 0

    @contextmanager
    def track(self) -> Iterator[None]:
        """Count a request while inside."""
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1

    async def run(self) -> None:
        """Keep the gauge up to date: Ray forgets one that is not set again."""
        while True:
            self.update()
            await asyncio.sleep(_PERIOD_S)

    def update(self) -> None:
        """Set the gauge."""
        self._streams.set(self._running)
