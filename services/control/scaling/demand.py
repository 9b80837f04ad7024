"""Forecasts the work that arrives, now and when a replica started now is ready.

Work is counted in server-seconds per second, from arrivals: requests in a queue have already
been counted, so back-pressure cannot hide demand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .values import Floats

RECENT_S = (20.0, 6.0)  # what a longer window must agree with
SIGMAS = 4.0  # how far they may differ by chance
TREND_WINDOW_S = 240.0  # shorter windows are too noisy for a trend
SPANS = (1.0, 0.5, 0.25, 0.1, 0.04)  # of the window, longest first
BINS = 30
MOST_GROWTH = 2.0  # of a trend over the horizon
DISPERSION_S = 5.0  # time scale on which arrivals clump


@dataclass(frozen=True, slots=True)
class Demand:
    """Server-seconds of work that arrive per second."""

    now: float
    ahead: float  # when a replica started now is ready
    window_s: float  # how much of the past agrees with the present

    @property
    def peak(self) -> float:
        """The highest load that the pool must sustain from now until then."""
        return max(self.now, self.ahead)


def demand(time_s: Floats, work_s: Floats, now_s: float, span_s: float, ahead_s: float) -> Demand:
    """Forecast from the longest recent window whose trend agrees with the last seconds.

    `time_s`, `work_s`: `[N]` arrivals in the last `span_s` seconds and their work. A jump makes
    long windows disagree, so the forecast follows it within seconds; without one, long windows
    average the noise away.
    """
    if span_s <= 0.0 or len(time_s) == 0:
        return Demand(0.0, 0.0, max(span_s, 0.0))
    age_s = now_s - time_s
    for share in SPANS:
        window_s = share * span_s
        if window_s <= RECENT_S[0]:
            break
        level, slope = _trend(age_s, work_s, window_s)
        if all(_agrees(age_s, work_s, recent, level) for recent in RECENT_S):
            ahead = min(max(level + slope * ahead_s, 0.0), MOST_GROWTH * level)
            return Demand(level, ahead, window_s)
    window_s = min(span_s, RECENT_S[0])
    # Of less than the last seconds, chance would decide: they count as if nothing came before.
    counted_s = max(span_s, RECENT_S[-1])
    level = max(_rate(age_s, work_s, min(recent, counted_s)) for recent in RECENT_S)
    return Demand(level, level, window_s)


def dispersion(time_s: Floats, each: float, now_s: float, window_s: float) -> float:
    """Return variance over mean of the arrivals in bins: 1 for Poisson, more when they clump.

    `time_s`: `[N]`; every one stands for `each` arrivals.
    """
    bins = int(window_s / DISPERSION_S)
    if bins < 8 or len(time_s) < 4 * bins:
        return 1.0
    edges = now_s - DISPERSION_S * np.arange(bins, -1, -1)
    counts = np.diff(np.searchsorted(time_s, edges))
    differences = np.diff(counts)  # a trend cancels out
    mean = float(counts.mean())
    return max(1.0, each * float(np.mean(differences**2)) / 2 / mean) if mean > 0 else 1.0


def _trend(age_s: Floats, work_s: Floats, window_s: float) -> tuple[float, float]:
    """Fit the level at age 0 and the slope per second by least squares over equal bins."""
    edge = window_s / BINS
    work = np.histogram(age_s, bins=BINS, range=(0.0, window_s), weights=work_s)[0] / edge
    mean = float(work.mean())
    if window_s < TREND_WINDOW_S:
        return mean, 0.0
    time = -(np.arange(BINS) + 0.5) * edge
    centred = time - time.mean()
    slope = float(centred @ work) / float(centred @ centred)
    return max(0.0, mean - slope * float(time.mean())), slope


def _agrees(age_s: Floats, work_s: Floats, recent_s: float, level: float) -> bool:
    """Return True if the last seconds' work could come from `level` by chance."""
    recent = work_s[age_s < recent_s]
    expected = level * recent_s
    typical = float(np.mean(work_s))
    chance = np.sqrt(max(float(recent @ recent), expected * typical, typical**2))
    return bool(abs(float(recent.sum()) - expected) <= SIGMAS * chance)


def _rate(age_s: Floats, work_s: Floats, recent_s: float) -> float:
    return float(work_s[age_s < recent_s].sum()) / recent_s
