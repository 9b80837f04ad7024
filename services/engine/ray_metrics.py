"""vLLM's engine metrics as Ray's (`ray_vllm_*`), so that they leave the replica."""

from __future__ import annotations

from vllm.v1.metrics.buckets import histogram_buckets
from vllm.v1.metrics.loggers import StatLoggerFactory
from vllm.v1.metrics.ray_wrappers import RayPrometheusStatLogger

# Of vLLM's histograms, those that a gateway observes too, for its clients. A node exports a
# histogram with the bounds that it sees first: they must be vLLM's.
LATENCIES = {
    "time_to_first_token_seconds": "Histogram of time to first token in seconds.",
    "inter_token_latency_seconds": "Histogram of inter-token latency in seconds.",
    "request_queue_time_seconds": "Histogram of time spent in WAITING phase for request.",
    "e2e_request_latency_seconds": "Histogram of e2e request latency in seconds.",
}
_FAMILIES = {
    "time_to_first_token_seconds": "time_to_first_token",
    "inter_token_latency_seconds": "inter_token_latency",
    "request_queue_time_seconds": "request_latency",
    "e2e_request_latency_seconds": "request_latency",
}


def ray_stat_loggers() -> tuple[StatLoggerFactory, ...]:
    """Return loggers for an engine inside a Serve replica, whose id its series carry."""
    return (RayPrometheusStatLogger,)


def latency_buckets(name: str) -> list[float]:
    """Return vLLM's bounds, in seconds, of one of `LATENCIES`."""
    return list(histogram_buckets(_FAMILIES[name]))
