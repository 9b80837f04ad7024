"""The policy's decisions as metrics of Serve's controller (`ray_specprefill_scaling_*`)."""

from __future__ import annotations

from typing import Any

from ray.util import metrics

from ..control.scaling.values import Decision, Pool, ScalingReason


class PolicyGauges:
    """The metrics of one policy; create them where it runs. `make` is as `ray.util.metrics`.

    Every series names its application: the controller runs the policies of all applications.
    """

    def __init__(self, make: Any = metrics) -> None:
        def gauge(name: str, description: str, *tags: str) -> Any:
            return make.Gauge(
                f"specprefill_scaling_{name}",
                description=description,
                tag_keys=("application", *tags),
            )

        def counter(name: str, description: str, *tags: str) -> Any:
            return make.Counter(
                f"specprefill_scaling_{name}",
                description=description,
                tag_keys=("application", *tags),
            )

        self._replicas = gauge(
            "replicas", "Replicas that the policy requests, within its bounds", "pool"
        )
        self._wanted = gauge("wanted", "Replicas that the SLO needs", "pool")
        self._reasons = counter("decisions_total", "Decisions by reason", "pool", "reason")
        self._failures = counter(
            "failures_total", "Decisions that failed; the pools keep their sizes", "reason"
        )
        self._keep_high = gauge(
            "keep_high", "Upper bound of the keep rate, as the policy would set it"
        )
        self._reason = gauge("reason", "1 for the reason of the last decision", "pool", "reason")
        self._reason_of: dict[Pool, ScalingReason] = {}
        self._advisory = gauge(
            "advisory", "1: decisions are reported and change nothing (`scaling.advisory`)"
        )

    def record_decision(self, application: str, decision: Decision, *, advisory: bool) -> None:
        """Record a decision, with its reasons."""
        tags = {"application": application}
        self._advisory.set(int(advisory), tags)
        for pool, decided in decision.pools.items():
            of_pool = {**tags, "pool": pool.value}
            self._replicas.set(decided.replicas, of_pool)
            self._wanted.set(decided.wanted, of_pool)
            self._reasons.inc(1, {**of_pool, "reason": decided.reason.value})
            self._show_reason(pool, decided.reason, of_pool)
        self._keep_high.set(decision.keep.high, tags)

    def _show_reason(self, pool: Pool, reason: ScalingReason, tags: dict[str, str]) -> None:
        before = self._reason_of.get(pool)
        if before is not None and before is not reason:
            self._reason.set(0, {**tags, "reason": before.value})
        self._reason.set(1, {**tags, "reason": reason.value})
        self._reason_of[pool] = reason

    def record_failure(self, application: str, reason: str) -> None:
        """Record a failed decision: targets are held."""
        self._failures.inc(1, {"application": application, "reason": reason})
