"""The policy's decisions as metrics of Serve's controller (`ray_specprefill_scaling_*`)."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from ..control.scaling.values import Decision, Pool, ScalingReason


class PolicyGauges:
    """The metrics of one policy; create them where the policy runs."""

    def __init__(self) -> None:
        self._replicas = Gauge(
            "specprefill_scaling_replicas", "Replicas that the policy asks for", ("pool",)
        )
        self._wanted = Gauge(
            "specprefill_scaling_wanted", "Replicas that the SLO asks for", ("pool",)
        )
        self._reasons = Counter(
            "specprefill_scaling_decisions_total", "Decisions by reason", ("pool", "reason")
        )
        self._reason = Gauge(
            "specprefill_scaling_reason",
            "1 for the reason of the last decision",
            ("pool", "reason"),
        )
        self._reason_of: dict[Pool, ScalingReason] = {}
        self._advisory = Gauge(
            "specprefill_scaling_advisory", "1: decisions are reported and change nothing"
        )
        self._failures = Counter(
            "specprefill_scaling_failures_total", "Decisions that failed", ("reason",)
        )
        self._keep_high = Gauge("specprefill_scaling_keep_high", "Upper bound of the keep rate")

    def record_decision(self, decision: Decision, *, advisory: bool) -> None:
        """Record a decision, with its reasons."""
        self._advisory.set(int(advisory))
        for pool, decided in decision.pools.items():
            self._replicas.set(decided.replicas, {"pool": pool.value})
            self._wanted.set(decided.wanted, {"pool": pool.value})
            self._reasons.inc(1, {"pool": pool.value, "reason": decided.reason.value})
            self._show_reason(pool, decided.reason)
        self._keep_high.set(decision.keep.high)

    def _show_reason(self, pool: Pool, reason: ScalingReason) -> None:
        before = self._reason_of.get(pool)
        if before is not None and before is not reason:
            self._reason.set(0, {"pool": pool.value, "reason": before.value})
        self._reason.set(1, {"pool": pool.value, "reason": reason.value})
        self._reason_of[pool] = reason

    def record_failure(self, reason: str) -> None:
        """Record a failed decision: targets are held."""
        self._failures.inc(1, {"reason": reason})
