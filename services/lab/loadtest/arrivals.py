"""Send times: fixed before the first request, so that a slow server cannot slow the load.

Pure: a process and a seeded generator in, ascending seconds from the start of the run out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from ...config import Seconds, Strict

Qps = Annotated[float, Field(gt=0.0)]
Times = NDArray[np.float64]  # [requests], ascending


class Constant(Strict):
    """One request every `1 / qps` seconds."""

    kind: Literal["constant"]
    qps: Qps


class Poisson(Strict):
    """Independent arrivals at a mean rate."""

    kind: Literal["poisson"]
    qps: Qps


class Bursty(Strict):
    """Gamma-distributed gaps; `burstiness` below 1 clusters arrivals, above 1 spaces them.

    The same meaning as `--burstiness` of `vllm bench serve`; 1 is Poisson.
    """

    kind: Literal["bursty"]
    qps: Qps
    burstiness: Annotated[float, Field(gt=0.0)] = 0.25


class Ramp(Strict):
    """Poisson arrivals whose rate goes linearly from `start_qps` to `end_qps` over the run."""

    kind: Literal["ramp"]
    start_qps: Qps
    end_qps: Qps


class Burst(Strict):
    """Poisson arrivals at `qps`, and at `burst_qps` during `[start_s, start_s + length_s)`."""

    kind: Literal["burst"]
    qps: Qps
    burst_qps: Qps
    start_s: Annotated[float, Field(ge=0.0)]
    length_s: Seconds


class RecordedTrace(Strict):
    """The times, and where it gives them the lengths, of a JSONL file's lines (see `trace`)."""

    kind: Literal["trace"]
    path: str
    speed: Annotated[float, Field(gt=0.0)] = 1.0  # 2: twice as fast as recorded


class Concurrency(Strict):
    """A closed loop: each client sends its next request when its last one has ended.

    As `--max-concurrency` of `vllm bench serve`. A slow server slows this load, so its latencies
    say nothing of a rate.
    """

    kind: Literal["concurrency"]
    clients: PositiveInt


Process = Annotated[
    Constant | Poisson | Bursty | Ramp | Burst | RecordedTrace | Concurrency,
    Field(discriminator="kind"),
]
Generated = Constant | Poisson | Bursty | Ramp | Burst


class Length(Strict):
    """The length of a run: a number of requests, or the seconds in which requests are sent."""

    requests: PositiveInt | None = None
    seconds: Seconds | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.requests is None) == (self.seconds is None):
            raise ValueError("give either `requests` or `seconds`")
        return self


@dataclass(frozen=True, slots=True)
class Part:
    """One client process's part of a run: every `of`-th request from the `place`-th on."""

    place: int = 0
    of: int = 1

    def share(self, number: int) -> int:
        """Return how many of `number` requests or clients are this part's."""
        return (number - self.place + self.of - 1) // self.of


WHOLE = Part()


def times(process: Generated, length: Length, rng: np.random.Generator) -> Times:
    """Return the send times of a run."""
    if length.seconds is not None:
        return _arrivals_within(process, length.seconds, rng)
    count = length.requests or 0
    if isinstance(process, Ramp):
        # The mean of both rates holds over the whole ramp, so this is how long it takes.
        whole_s = 2.0 * count / (process.start_qps + process.end_qps)
        return _ramp(process, whole_s, np.sort(rng.random(count)))
    return _first_arrivals(process, count, rng)


def _arrivals_within(process: Generated, seconds: float, rng: np.random.Generator) -> Times:
    if isinstance(process, Ramp):
        count = rng.poisson(seconds * (process.start_qps + process.end_qps) / 2.0)
        return _ramp(process, seconds, np.sort(rng.random(count)))
    expected = seconds * _highest_rate(process)
    enough = int(expected + 10.0 * np.sqrt(expected * _gap_variance(process)) + 50.0)
    sent = _first_arrivals(process, enough, rng)
    return sent[sent < seconds]


def _first_arrivals(
    process: Constant | Poisson | Bursty | Burst, count: int, rng: np.random.Generator
) -> Times:
    """Return the first `count` arrivals. The first one of a constant rate is at 0."""
    match process:
        case Constant():
            return np.arange(count, dtype=np.float64) / process.qps
        case Poisson():
            return np.cumsum(rng.exponential(1.0 / process.qps, count))
        case Bursty():
            scale = 1.0 / (process.qps * process.burstiness)
            return np.cumsum(rng.gamma(process.burstiness, scale, count))
        case Burst():
            return _burst(process, np.cumsum(rng.exponential(1.0, count)))


def _burst(process: Burst, unit: Times) -> Times:
    """Warp unit-rate arrivals to the process's rate: the inverse of its integral."""
    before = process.start_s * process.qps
    during = process.length_s * process.burst_qps
    return np.where(
        unit < before,
        unit / process.qps,
        np.where(
            unit < before + during,
            process.start_s + (unit - before) / process.burst_qps,
            process.start_s + process.length_s + (unit - before - during) / process.qps,
        ),
    )


def _ramp(process: Ramp, whole_s: float, share: Times) -> Times:
    """Return the time at which `share` (0..1) of the ramp's arrivals have come."""
    start, end = process.start_qps, process.end_qps
    if start == end:
        return share * whole_s
    slope = (end - start) / whole_s
    done = share * whole_s * (start + end) / 2.0
    return (np.sqrt(start**2 + 2.0 * slope * done) - start) / slope


def _highest_rate(process: Constant | Poisson | Bursty | Burst) -> float:
    return max(process.qps, process.burst_qps) if isinstance(process, Burst) else process.qps


def _gap_variance(process: Constant | Poisson | Bursty | Burst) -> float:
    """Return the squared coefficient of variation of the gaps."""
    return 1.0 / process.burstiness if isinstance(process, Bursty) else 1.0
