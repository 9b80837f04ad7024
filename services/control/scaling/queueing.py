"""A queueing model of the pools: the share of requests that meet the SLO, for any pool sizes.

Each pool is a GI/G/c queue. The chance to wait at all is Sakasegawa's approximation, the wait of
those who do is exponential with the mean of Allen and Cunneen. The first token waits twice, for a
speculator and for a prefill engine; the two waits and the stage times of the *sampled* requests
(not their means) give the distribution of the time to first token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .values import Floats

TINY = 1e-12
CLOSE = 1e-4  # relative distance of two means that count as one


@dataclass(frozen=True, slots=True)
class Load:
    """The load of one pool."""

    work: float  # server-seconds per second; below the servers, or the queue grows forever
    service_s: float  # mean time of one request
    variability: float  # mean of the squared coefficients of variation: arrivals and service
    share: float = 1.0  # of all requests, that come here


def load(work: float, service_s: Floats, dispersion: float) -> Load:
    """Return the load of requests `[N]`; those that take no time do not come here."""
    busy = service_s[service_s > 0.0]
    if len(busy) == 0:
        return Load(0.0, 0.0, 1.0, 0.0)
    mean = float(busy.mean())
    squared = float(busy.var()) / mean**2
    return Load(work, mean, (dispersion + squared) / 2, len(busy) / len(service_s))


@dataclass(frozen=True, slots=True, eq=False)
class Waits:
    """The waits of pools of `[C]` sizes: the chance of a wait, and its mean."""

    chance: Floats
    mean_s: Floats
    stable: Floats  # 1.0 or 0.0


def waits(load: Load, servers: Floats) -> Waits:
    """Return the waits in front of `servers`, `[C]`."""
    if load.work <= 0.0:
        nothing = np.zeros_like(servers)
        return Waits(nothing, nothing + TINY, nothing + 1.0)
    usage = np.clip(load.work / np.maximum(servers, TINY), 0.0, 1.0 - 1e-9)
    chance = usage ** (np.sqrt(2.0 * (servers + 1.0)) - 1.0)
    mean_s = load.service_s * load.variability / (np.maximum(servers, TINY) * (1.0 - usage))
    stable = (load.work < servers).astype(np.float64)
    return Waits(chance * load.share, np.maximum(mean_s, TINY), stable)


def two_stage_attainment(first: Waits, second: Waits, slack_s: Floats) -> Floats:
    """Return the share of requests whose two waits end within their slack: `[C1, C2]`.

    `slack_s` `[N]` is what each sampled request's stages leave of the SLO; below zero: lost.
    """
    left = slack_s[slack_s >= 0.0]
    possible = len(left) / len(slack_s)
    if possible == 0.0:
        return np.zeros((len(first.chance), len(second.chance)))
    one, one_s = first.chance[:, None], first.mean_s[:, None]
    two, two_s = second.chance[None, :], second.mean_s[None, :]
    tail_one, tail_two = _tail(first, left)[:, None], _tail(second, left)[None, :]
    both = _tail_of_both(one_s, tail_one, two_s, tail_two, left)
    late = one * (1.0 - two) * tail_one + two * (1.0 - one) * tail_two + one * two * both
    met = possible * np.clip(1.0 - late, 0.0, 1.0)
    return np.asarray(met * first.stable[:, None] * second.stable[None, :])


def _tail_of_both(
    one_s: Floats, tail_one: Floats, two_s: Floats, tail_two: Floats, left_s: Floats
) -> Floats:
    """Return the mean chance that two waits in a row exceed the slack: `[C1, C2]`.

    Their sum is hypoexponential; where the means are close, Erlang of two stages, since the
    difference of two close numbers by another is noise.
    """
    apart_s = one_s - two_s
    close = np.abs(apart_s) <= CLOSE * np.maximum(one_s, two_s)
    both = np.asarray((one_s * tail_one - two_s * tail_two) / np.where(close, 1.0, apart_s))
    if bool(close.any()):
        means_s = np.broadcast_to((one_s + two_s) / 2.0, both.shape)[close]
        ratio = left_s[None, :] / means_s[:, None]
        both[close] = ((1.0 + ratio) * np.exp(-ratio)).mean(axis=1)
    return both


def attainment(pool: Waits, within_s: float) -> Floats:
    """Return the share of requests that wait at most `within_s`: `[C]`."""
    return np.asarray((1.0 - pool.chance * np.exp(-within_s / pool.mean_s)) * pool.stable)


def _tail(pool: Waits, left_s: Floats) -> Floats:
    """Return the mean chance that a wait exceeds the slack, given a wait: `[C]`."""
    return np.asarray(np.exp(-left_s[None, :] / pool.mean_s[:, None]).mean(axis=1))
