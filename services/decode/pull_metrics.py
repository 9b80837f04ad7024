"""Pulls of a decode replica's engine, as Serve metrics (`ray_specprefill_kv_pull*`)."""

from __future__ import annotations

from typing import Any

from ray.serve import metrics

from ..engine.params import PullOutcome

_SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
    *(20, 40, 80, 160, 320, 640),  # a pull may take as long as a request
)


class PullMetrics:
    """One replica's metrics. `make` is as `ray.serve.metrics`."""

    def __init__(self, make: Any = metrics) -> None:
        def histogram(name: str, description: str) -> Any:
            return make.Histogram(
                f"specprefill_kv_{name}", description=description, boundaries=_SECONDS
            )

        self._pulls = make.Counter(
            "specprefill_kv_pulls_total",
            description="Pulls by outcome: `pulled`, or `recomputed` where the pull failed",
            tag_keys=("outcome",),
        )
        self._pull_s = histogram("pull_seconds", "From the order to pull until the KV is there")
        self._exposed_s = histogram(
            "pull_exposed_seconds", "The part of a pull that did not overlap with the prefill"
        )

    def record(self, pull: PullOutcome) -> None:
        """Count a pull that has ended."""
        self._pulls.inc(1, {"outcome": "recomputed" if pull.recomputed else "pulled"})
        if not pull.recomputed:
            self._pull_s.observe(pull.pull_s)
            self._exposed_s.observe(pull.exposed_s)
