"""Inputs of a simulation beside the trace, and its results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from ...control.scaling.values import Engines, Floats, Observation, Pool, Slo
from ...control.stages import Curve
from .machine import Machine
from .steps import StepLimits


@dataclass(frozen=True, slots=True)
class ReplicaFailure:
    """Replicas that die at a moment, with their work; requests run again elsewhere."""

    time_s: float
    pool: Pool
    replicas: int = 1


@dataclass(frozen=True, slots=True)
class World:
    """The service under simulation."""

    engines: Engines
    slo: Slo
    cold_start_s: Mapping[Pool, float]
    keep: float = 0.3
    keep_floor: float = 0.1
    min_prompt_tokens: int = 1024
    timeout_s: float = 60.0  # a client gives up when it has no first token by then
    tick_s: float = 5.0  # how often the controller is asked
    failures: tuple[ReplicaFailure, ...] = ()
    front: Curve | None = None  # HTTP, tokenising and hops before the pools, by prompt tokens
    passes: StepLimits | None = None  # None: a speculator reads one prompt after the other
    steps: StepLimits | None = None  # None: a prefill engine computes one prompt after the other
    machine: Machine | None = None  # None: every engine has an accelerator of its own
    aside: Curve | None = None  # on a machine: work per request that no stage waits for
    others: tuple[tuple[float, float], ...] = ()  # on a machine: from when, cores others take


@dataclass(frozen=True, slots=True, eq=False)
class Telemetry:
    """All that any controller may look at. Columns hold the newest last."""

    seen: Observation
    ongoing: Mapping[Pool, int]  # queued and running requests
    first_token_s: Floats  # when first tokens came, in the last minute ...
    ttft_s: Floats  # ... and how long those requests had waited for them
    gap_s: Floats  # between the first two tokens
    completed: int  # answers, since the start
    first_tokens: int  # since the start


@dataclass(frozen=True, slots=True)
class PoolTarget:
    """A controller's answer: the sizes of the pools."""

    replicas: Mapping[Pool, int]


class Controller(Protocol):
    """Sizes the pools; asked every `tick_s`."""

    def target(self, now: Telemetry) -> PoolTarget:
        """Return the sizes from now on, those that start included."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Moments:
    """The state at each tick, as columns."""

    time_s: Floats
    provisioned: Mapping[Pool, Floats]
    ready: Mapping[Pool, Floats]
    queued: Floats  # requests before their first token's engine
    keep: Floats  # mean over the pruned prompts that arrived since the tick before; NaN: none


@dataclass(frozen=True, slots=True, eq=False)
class SimulationResult:
    """The results of each request `[N]`, and their cost."""

    ttft_s: Floats  # NaN: no first token
    gap_s: Floats  # NaN: no second token
    keep: Floats  # of pruned prompts; 1: dense
    shed: Floats  # 1.0: refused at once
    replica_s: Mapping[Pool, float]  # starting and retiring ones included
    moments: Moments
    duration_s: float
    core_s: float = 0.0  # core-seconds of a shared machine

    def meets_slo(self, slo: Slo) -> Floats:
        """Return 1.0 where the first two tokens came in time."""
        in_time = (self.ttft_s <= slo.ttft_s) & ~(self.gap_s > slo.gap_s)
        return in_time.astype(np.float64)
