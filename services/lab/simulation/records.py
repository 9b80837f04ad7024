"""The results of a simulation's requests, and the states of its pools over time."""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Sequence
from math import nan

import numpy as np

from ...control.scaling.values import Pool
from .station import Station
from .world import Moments, SimulationResult

POOLS = (Pool.SPECULATOR, Pool.PREFILL, Pool.DECODE)
SHORT_LOOK_BACK_S = 60.0  # of the latencies that controllers see


class Records:
    """The records of `count` requests. Times are seconds of the simulation."""

    def __init__(self, count: int) -> None:
        self.completed = 0
        self.shed: list[int] = []
        self._ttft_s, self._gap_s = [nan] * count, [nan] * count
        self._first_tokens, self._waited_s = array("d"), array("d")  # when, and after how long
        self._second_tokens, self._gaps_s = array("d"), array("d")
        self._moments: list[tuple[float, ...]] = []

    def record_first_token(self, request: int, now_s: float, waited_s: float) -> None:
        """Record a request's first token, `waited_s` after it came."""
        self._ttft_s[request] = waited_s
        self._first_tokens.append(now_s)
        self._waited_s.append(waited_s)

    def record_second_token(self, request: int, now_s: float, gap_s: float) -> None:
        """Record the start of a request's decoding, `gap_s` between its first two tokens."""
        self._gap_s[request] = gap_s
        self._second_tokens.append(now_s)
        self._gaps_s.append(gap_s)

    @property
    def first_tokens(self) -> int:
        """Number of first tokens so far."""
        return len(self._first_tokens)

    def recent_times(self, now_s: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the last first tokens' times and waits, and the last gaps; each `[n]`."""
        newest = bisect_left(self._first_tokens, now_s - SHORT_LOOK_BACK_S)
        second = bisect_left(self._second_tokens, now_s - SHORT_LOOK_BACK_S)
        return (
            np.array(self._first_tokens[newest:]),
            np.array(self._waited_s[newest:]),
            np.array(self._gaps_s[second:]),
        )

    def record_moment(
        self, now_s: float, stations: Sequence[Station], keep: Sequence[float]
    ) -> None:
        """Record the pools as they are; `keep` are the rates of requests since the last moment."""
        keeps = [rate for rate in keep if rate < 1.0]
        speculators, prefills, _ = stations
        self._moments.append(
            (
                now_s,
                *(float(station.size) for station in stations),
                *(float(station.ready) for station in stations),
                float(len(speculators.waiting) + len(prefills.waiting)),
                sum(keeps) / len(keeps) if keeps else nan,
            )
        )

    def outcome(
        self, now_s: float, stations: Sequence[Station], keep: Sequence[float], core_s: float
    ) -> SimulationResult:
        """Return everything, at the end. Bills the stations."""
        for station in stations:
            station.bill(max(now_s, station.updated_s))
        shed = np.zeros(len(self._ttft_s))
        shed[self.shed] = 1.0
        columns = np.array(self._moments).T
        return SimulationResult(
            np.array(self._ttft_s),
            np.array(self._gap_s),
            np.array(keep),
            shed,
            {pool: each.billed_s for pool, each in zip(POOLS, stations, strict=True)},
            Moments(
                columns[0],
                dict(zip(POOLS, columns[1:4], strict=True)),
                dict(zip(POOLS, columns[4:7], strict=True)),
                columns[7],
                columns[8],
            ),
            now_s,
            core_s,
        )
