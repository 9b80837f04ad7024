"""vLLM's engine metrics as Ray's (`ray_vllm_*`), so that they leave the replica."""

from __future__ import annotations

from vllm.v1.metrics.loggers import StatLoggerFactory
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger


def ray_stat_loggers() -> tuple[StatLoggerFactory, ...]:
    """Return loggers for an engine inside a Serve replica, whose id its series carry."""
    return (RayPrometheusStatLogger,)
