"""Latencies as clients see them, under the names of vLLM's own (`ray_vllm_*`).

Dashboards made for vLLM work on them: choose the served name as `model_name`. The engines' own
series carry the served name and the pool, as in `demo/prefill`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from ray.serve import metrics

from ...core.types import Chunk, Request
from ...engine.ray_metrics import LATENCIES, latency_buckets
from .watched import Ending, Observer, RequestObserver

GAPS_AT_ONCE = 128  # times between tokens that are observed in a row


class ClientLatencies(Observer):
    """One gateway's histograms. `make` is as `ray.serve.metrics`."""

    def __init__(
        self, model_name: str, make: Any = metrics, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._histograms = {
            name: make.Histogram(
                f"vllm_{name}",
                description=description,
                boundaries=latency_buckets(name),
                tag_keys=("model_name",),
            )
            for name, description in LATENCIES.items()
        }
        for histogram in self._histograms.values():  # tags of a call would be merged for each token
            histogram.set_default_tags({"model_name": model_name})
        self._gaps_s: list[float] = []  # between tokens, yet to be observed
        self.now = now

    def add_gap(self, seconds: float) -> None:
        """Observe a time between two tokens, with the next `GAPS_AT_ONCE` or a request's end."""
        self._gaps_s.append(seconds)
        if len(self._gaps_s) >= GAPS_AT_ONCE:
            self.observe_gaps()

    def observe_gaps(self) -> None:
        """Observe what was added."""
        gaps_s, self._gaps_s = self._gaps_s, []
        observe = self._histograms["inter_token_latency_seconds"].observe
        for each in gaps_s:
            observe(each)

    def observe(self, name: str, seconds: float) -> None:
        """Observe one of `LATENCIES`."""
        self._histograms[name].observe(seconds)

    def on_arrival(self, request: Request) -> RequestObserver:
        """See Observer."""
        return _RequestClock(request, self)


class _RequestClock(RequestObserver):
    """Times one request."""

    def __init__(self, request: Request, latencies: ClientLatencies) -> None:
        self._latencies = latencies
        self._arrived_s = latencies.now()
        self._newest_s: list[float | None] = [None] * request.samples

    def on_chunk(self, chunk: Chunk) -> None:
        if not chunk.token_ids:
            return
        now_s, before_s = self._latencies.now(), self._newest_s[chunk.index]
        if before_s is not None:
            self._latencies.add_gap((now_s - before_s) / len(chunk.token_ids))
        elif not any(self._newest_s):
            self._latencies.observe("time_to_first_token_seconds", now_s - self._arrived_s)
        self._newest_s[chunk.index] = now_s

    def on_end(self, ending: Ending) -> None:
        self._latencies.observe_gaps()
        if ending.report is None:
            return
        self._latencies.observe("request_queue_time_seconds", ending.report.queue_s)
        latency_s = self._latencies.now() - self._arrived_s
        self._latencies.observe("e2e_request_latency_seconds", latency_s)
