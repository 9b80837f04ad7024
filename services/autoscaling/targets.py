"""Converts the deployment's configuration to the core's policy and to Serve's settings. Pure."""

from __future__ import annotations

from typing import Any

from ..config import AppConfig, PoolScaling
from ..control.gain import TYPICAL_KEEP
from ..control.scaling.values import Pool, PoolLimits, ScalingPolicy, Slo

REPORT_S = 1.0  # period of the replicas' signals
KEEP_FLOOR = 0.1  # a burst lowers the keep rate no further, without admission control


def scaling_policy(config: AppConfig) -> ScalingPolicy:
    """Return the operator's policy. Raises ValueError without an SLO."""
    if config.slo is None:
        raise ValueError("args.slo: the autoscaling policy needs an SLO")
    scaling, asked = config.scaling, config.selection.keep
    keep = TYPICAL_KEEP if asked == "auto" else asked
    admission = config.gateway.admission
    floor = KEEP_FLOOR if admission is None else admission.keep_floor
    return ScalingPolicy(
        slo=Slo(config.slo.ttft_s, config.slo.percentile / 100.0, config.slo.gap_s),
        pools={
            Pool.SPECULATOR: _limits(scaling.speculator),
            Pool.PREFILL: _limits(scaling.prefill),
            Pool.DECODE: _limits(scaling.decode),
        },
        keep=keep,
        keep_floor=min(floor, keep),
        settle_s=scaling.settle_s,
        idle_s=scaling.idle_s,
        window_s=scaling.window_s,
    )


def autoscaling_config(minimum: int, maximum: int) -> dict[str, Any]:
    """Return a deployment's `autoscaling_config`: bounds and reports; the policy does the rest."""
    return {
        "min_replicas": minimum,
        "max_replicas": maximum,
        "metrics_interval_s": REPORT_S,
        "look_back_period_s": 2 * REPORT_S,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,  # the core has waited already
    }


def _limits(pool: PoolScaling) -> PoolLimits:
    return PoolLimits(pool.min_replicas, pool.max_replicas, pool.cost, pool.cold_start_s)
