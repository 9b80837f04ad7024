"""Converts Serve's state of the pools to the core's observation."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any, Self

from ray.serve.config import AutoscalingContext

from ..control.scaling.values import Arrivals, Engines, Observation, Pool, PoolState
from ..control.stages import DEFAULT_CURVES, StageCurves
from .arrival_rates import Traffic
from .signals import (
    CACHED_SHARE,
    DECODE_SLOTS,
    KV_TOKENS,
    OUTPUT_TOKEN_S,
    QUEUE_AGE_S,
    REMEMBERED_SHARE,
    Signals,
    arrivals_in,
    curves_in,
)

GATEWAY, DECODE = "Gateway", "Decode"
POOLS = {"Speculator": Pool.SPECULATOR, "Prefill": Pool.PREFILL, DECODE: Pool.DECODE}
STALE_S = 5.0  # replicas report every second
_OUTPUT_TOKEN_S, _DECODE_SLOTS = 0.03, 32  # until they are known
_FULL = 0.9  # of a decode replica's KV cache, at the mean: so that few answers are preempted

Contexts = Mapping[Any, AutoscalingContext]


@dataclass(frozen=True, slots=True)
class PoolView:
    """One pool's deployment."""

    key: Any  # Serve's deployment id
    target: int
    running: int
    minimum: int


def pool_views(contexts: Contexts) -> dict[Pool, PoolView]:
    """Return the pools among an application's deployments."""
    return {
        POOLS[context.deployment_name]: PoolView(
            key,
            context.target_num_replicas,
            context.current_num_replicas,
            context.capacity_adjusted_min_replicas,
        )
        for key, context in contexts.items()
        if context.deployment_name in POOLS
    }


def application_name(contexts: Contexts) -> str:
    """Return the name of the application whose deployments these are; empty without any."""
    return next((str(context.app_name) for context in contexts.values()), "")


@dataclass(frozen=True, slots=True)
class LatestSignals:
    """The newest signals of each replica that reported lately, by deployment name."""

    replicas: Mapping[str, Mapping[str, Signals]]

    @classmethod
    def read(cls, contexts: Contexts, now_s: float) -> Self:
        """Read Serve's time series."""
        return cls({c.deployment_name: _latest_signals(c, now_s) for c in contexts.values()})

    def gateway_signals(self) -> Mapping[str, Signals]:
        """Return the gateways' signals; Serve's own metrics alone are not a report."""
        reports = self.replicas.get(GATEWAY, {})
        return {name: signals for name, signals in reports.items() if OUTPUT_TOKEN_S in signals}

    def queue_age_s(self, name: str) -> float:
        """Return the age of the pool's oldest waiting request."""
        replicas = self.replicas.get(name, {}).values()
        return max((signals.get(QUEUE_AGE_S, 0.0) for signals in replicas), default=0.0)

    def decode_signals(self) -> list[Signals]:
        """Return the decode replicas' signals of what one of them holds."""
        reports = self.replicas.get(DECODE, {}).values()
        return [signals for signals in reports if KV_TOKENS in signals]


def _latest_signals(context: AutoscalingContext, now_s: float) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for name, series_by_replica in (context.raw_metrics or {}).items():
        for replica, series in series_by_replica.items():
            if series and now_s - series[-1].timestamp <= STALE_S:
                found.setdefault(str(replica), {})[name] = series[-1].value
    return found


class ClusterObserver:
    """Makes observations; keeps the state that one needs from those before it."""

    def __init__(self, window_s: float, decode_slots: int | None) -> None:
        """`decode_slots`: as configured; None: as the decode replicas report."""
        self._traffic = Traffic(window_s)
        self._slots = _DECODE_SLOTS if decode_slots is None else decode_slots
        self._kv_tokens = math.inf  # of one decode replica

    def observe(
        self, now_s: float, latest: LatestSignals, views: Mapping[Pool, PoolView]
    ) -> Observation:
        """Observe the pools. Without a gateway's report, arrivals are None: the core holds."""
        gateways = latest.gateway_signals()
        if gateways:
            counts = {name: arrivals_in(signals) for name, signals in gateways.items()}
            self._traffic.add_counts(now_s, counts)
        arrivals = self._traffic.arrivals()
        for signals in latest.decode_signals():  # all alike; remembered while the pool sleeps
            self._slots, self._kv_tokens = int(signals[DECODE_SLOTS]), signals[KV_TOKENS]
        return Observation(
            now_s,
            self._traffic.since_s,
            arrivals if gateways else None,
            {
                POOLS[name]: _pool_state(views[POOLS[name]], latest.queue_age_s(name))
                for name in POOLS
                if POOLS[name] in views
            },
            self._engines(gateways.values(), self._decode_slots(arrivals)),
        )

    def _decode_slots(self, arrivals: Arrivals) -> int:
        """Return the sequences that a decode replica runs at once, those its KV cache has room for.

        As if no two shared a prefix.
        """
        if len(arrivals) == 0:
            return self._slots
        held_tokens = float((arrivals.kept_tokens + arrivals.output_tokens).mean())
        return max(1, int(min(self._slots, _FULL * self._kv_tokens / held_tokens)))

    def _engines(self, gateways: Iterable[Signals], decode_slots: int) -> Engines:
        """Return the gateways' learnt speeds, by medians: few requests do not outvote many."""
        learnt = list(gateways)
        if not learnt:
            return Engines(DEFAULT_CURVES, _OUTPUT_TOKEN_S, decode_slots)
        return Engines(
            _median_curves([curves_in(signals) for signals in learnt]),
            median(signals[OUTPUT_TOKEN_S] for signals in learnt),
            decode_slots,
            median(signals[CACHED_SHARE] for signals in learnt),
            median(signals.get(REMEMBERED_SHARE, 0.0) for signals in learnt),
        )


def _pool_state(view: PoolView, queue_age_s: float) -> PoolState:
    return PoolState(view.running, max(0, view.target - view.running), queue_age_s)


def _median_curves(curves: list[StageCurves]) -> StageCurves:
    """Return the curves whose prefill time at a usual length is the median."""
    ranked = sorted(curves, key=lambda each: each.prefill.seconds(2048))
    return ranked[len(ranked) // 2]
