"""What runs, why it has its size, and what it costs: from Serve's details and the metrics. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from .readings import Readings
from .serve_api import reason_of

GATEWAY, SPECULATOR, PREFILL, DECODE = "Gateway", "Speculator", "Prefill", "Decode"
ENGINES = (SPECULATOR, PREFILL, DECODE)
PER_TOKENS = 1000


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool: its replicas, and the autoscaler's last decision if there is one."""

    name: str
    status: str
    running: int
    target: int
    devices: float  # GPUs of one replica; 0 on CPUs
    decided: int | None = None  # the size that the autoscaler asks for, within its bounds
    wanted: int | None = None  # the size that the SLO needs
    reason: str | None = None  # of the decision
    message: str = ""  # Serve's, such as resources that a replica waits for


@dataclass(frozen=True, slots=True)
class SloStatus:
    """The requests that had their first token in time."""

    ttft_s: float
    wanted: float | None  # share of the requests
    attained: float | None  # None: no request has ended
    requests: int  # that ended, but for those whose client left


@dataclass(frozen=True, slots=True)
class WaitingRequests:
    """Requests that wait. None: nobody reports it."""

    admission: int | None
    speculator: int | None
    kv_room: int | None


@dataclass(frozen=True, slots=True)
class Usage:
    """What the engine pools occupied, and the tokens of the prompts that they answered."""

    device_s: Mapping[str, float]  # by pool: GPU-seconds, or replica-seconds on CPUs
    prompt_tokens: float
    kept_tokens: float  # prefilled


@dataclass(frozen=True, slots=True)
class Cost:
    """Device-seconds per 1,000 prompt tokens, beside an estimate for the same prompts dense."""

    unit: str  # GPU-s or replica-s
    per_1k_tokens: float
    dense_per_1k_tokens: float

    @property
    def saved(self) -> float:
        """The share of the dense cost that was not needed; negative where pruning costs more."""
        return 1.0 - self.per_1k_tokens / self.dense_per_1k_tokens


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One application."""

    name: str
    status: str
    message: str
    pools: tuple[PoolStatus, ...]
    advisory: bool  # the autoscaler changes nothing
    slo: SloStatus | None
    backlog: WaitingRequests
    cost: Cost | None

    @property
    def is_healthy(self) -> bool:
        """True if the application runs and every pool has its replicas."""
        return self.status == "RUNNING" and all(
            pool.status == "HEALTHY" and pool.running >= pool.target for pool in self.pools
        )


def service_status(
    name: str, application: Mapping[str, Any], readings: Readings, usage: Usage | None
) -> ServiceStatus:
    """Return the state of one application of Serve's details.

    `usage` is what the cost is computed from, None where nothing is known.
    """
    args = (application.get("deployed_app_config") or {}).get("args") or {}
    scaled = args.get("slo") is not None
    pools = tuple(
        _pool(name, pool, deployment, readings if scaled else Readings({}))
        for pool, deployment in application["deployments"].items()
    )
    return ServiceStatus(
        name,
        application["status"],
        application["message"],
        pools,
        advisory=scaled and readings.total("scaling_advisory", application=name) == 1.0,
        slo=_slo(name, args, readings),
        backlog=WaitingRequests(
            _count(readings.total("admission_waiting", application=name)),
            _count(readings.total("speculator_queued", application=name)),
            _count(readings.total("kv_waiting_for_room", application=name)),
        ),
        cost=None if usage is None else cost_of(usage, on_gpus=any(p.devices for p in pools)),
    )


def _pool(
    application: str, name: str, deployment: Mapping[str, Any], readings: Readings
) -> PoolStatus:
    decided_for = {"application": application, "pool": name.lower()}
    reasons = [
        labels["reason"] for labels, on in readings.select("scaling_reason", **decided_for) if on
    ]
    return PoolStatus(
        name,
        deployment["status"],
        len(running_replicas(deployment)),
        deployment["target_num_replicas"],
        devices_of(deployment),
        _count(readings.total("scaling_replicas", **decided_for)),
        _count(readings.total("scaling_wanted", **decided_for)),
        reasons[0] if len(reasons) == 1 else None,
        reason_of(deployment["message"]),
    )


def running_replicas(deployment: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the replicas that serve."""
    return [each for each in deployment["replicas"] if each["state"] == "RUNNING"]


def devices_of(deployment: Mapping[str, Any]) -> float:
    """Return the GPUs of one replica, its workers' included."""
    config = deployment.get("deployment_config") or {}
    bundles = config.get("placement_group_bundles") or []
    own = (config.get("ray_actor_options") or {}).get("num_gpus") or 0.0
    return float(sum(bundle.get("GPU", 0.0) for bundle in bundles) or own)


def _slo(name: str, args: Mapping[str, Any], readings: Readings) -> SloStatus | None:
    slo = args.get("slo")
    admission = (args.get("gateway") or {}).get("admission") or {}
    ttft_s = admission.get("ttft_s") if slo is None else slo["ttft_s"]
    if ttft_s is None:
        return None
    ended = readings.total("requests_total", application=name) or 0.0
    left = readings.total("requests_total", application=name, outcome="client_closed") or 0.0
    counted = ended - left
    early = first_tokens_within(ttft_s, readings, name)
    return SloStatus(
        float(ttft_s),
        None if slo is None else slo.get("percentile", 95.0) / 100.0,
        min(1.0, early / counted) if counted > 0 else None,
        round(counted),
    )


def first_tokens_within(limit_s: float, readings: Readings, application: str) -> float:
    """Return how many first tokens came within `limit_s`, linear between a histogram's bounds."""
    counts: dict[float, float] = {0.0: 0.0}
    for labels, count in readings.select(
        "time_to_first_token_seconds_bucket", application=application
    ):
        bound = float(labels["le"])
        counts[bound] = counts.get(bound, 0.0) + count
    for (low, below), (high, up_to) in pairwise(sorted(counts.items())):
        if low <= limit_s < high:
            share = 0.0 if high == float("inf") else (limit_s - low) / (high - low)
            return below + share * (up_to - below)
    return 0.0


def cost_of(usage: Usage, *, on_gpus: bool) -> Cost | None:
    """Return the cost, None before any prompt.

    Dense, the same prompts need no speculator, and a prefill pool that grows with its tokens:

        cost  = (speculator + prefill + decode) / prompt_tokens * 1000
        dense = (prefill * prompt_tokens / kept_tokens + decode) / prompt_tokens * 1000

    in device-seconds that the pools were up, idle or not. The quadratic part of attention is
    left out: the true dense cost is higher.
    """
    if usage.prompt_tokens <= 0 or usage.kept_tokens <= 0:
        return None
    scale = PER_TOKENS / usage.prompt_tokens
    prefill, decode = usage.device_s[PREFILL], usage.device_s[DECODE]
    dense = prefill * max(1.0, usage.prompt_tokens / usage.kept_tokens) + decode
    if dense <= 0:
        return None
    total = usage.device_s[SPECULATOR] + prefill + decode
    return Cost("GPU-s" if on_gpus else "replica-s", total * scale, dense * scale)


def usage_so_far(
    name: str, application: Mapping[str, Any], readings: Readings, now_s: float
) -> Usage | None:
    """Estimate usage since the oldest gateway started, by the replicas that run now.

    None without a gateway. Replicas that have stopped since are not known.
    """
    deployments = application["deployments"]
    starts = [each["start_time_s"] for each in _running(deployments, GATEWAY)]
    if not starts:
        return None
    device_s = {
        pool: sum(
            _weight(deployments, pool) * (now_s - max(replica["start_time_s"], min(starts)))
            for replica in _running(deployments, pool)
        )
        for pool in ENGINES
    }
    return Usage(device_s, *_tokens(name, readings))


def usage_between(
    name: str, application: Mapping[str, Any], grown: Readings, seconds: Mapping[str, float]
) -> Usage:
    """Return usage of a watched time: replica-seconds by pool, and what the counters grew by."""
    deployments = application["deployments"]
    device_s = {
        pool: seconds.get(pool, 0.0) * _weight(deployments, pool)
        for pool in ENGINES
    }  # fmt: skip
    return Usage(device_s, *_tokens(name, grown))


def replica_counts(application: Mapping[str, Any]) -> dict[str, int]:
    """Return the running replicas of each engine pool."""
    return {pool: len(list(_running(application["deployments"], pool))) for pool in ENGINES}


def _tokens(name: str, readings: Readings) -> tuple[float, float]:
    """Return the prompt and the kept tokens of answered requests: of others, nothing is kept."""
    counted = (
        readings.total(counter, application=name)
        for counter in ("kept_tokens_total", "saved_tokens_total")
    )
    kept, saved = (0.0 if value is None else value for value in counted)
    return kept + saved, kept


def _running(deployments: Mapping[str, Any], pool: str) -> Iterable[Mapping[str, Any]]:
    return running_replicas(deployments[pool]) if pool in deployments else ()


def _weight(deployments: Mapping[str, Any], pool: str) -> float:
    """Return a replica's GPUs; 1 for each replica where no pool has GPUs."""
    devices = {name: devices_of(deployments[name]) for name in ENGINES if name in deployments}
    return devices.get(pool, 0.0) if any(devices.values()) else 1.0


def _count(value: float | None) -> int | None:
    return None if value is None else round(value)
