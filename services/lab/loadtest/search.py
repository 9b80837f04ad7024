"""Varies the load of a scenario: the loads to try, and the trials' result.

Pure: loads out, results in. The runs themselves are the caller's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from .outcome import RequestEnding
from .scenario import MaxQps, PaperProtocol, Search, Sweep
from .statistics import Summary


@dataclass(frozen=True, slots=True)
class Trial:
    """One load, and whether the service sustained it."""

    load: float  # requests per second, or a sweep's clients
    held: bool
    summary: Summary


Trials = Generator[float, Summary, list[Trial]]


def max_qps(search: MaxQps) -> Trials:
    """Yield rates and take each run's summary: the ends first, then the middle of what is left."""
    trials: list[Trial] = []

    def judge(qps: float, summary: Summary) -> bool:
        trials.append(Trial(qps, summary.attainment >= search.attainment, summary))
        return trials[-1].held

    low, high = search.low, search.high
    if not judge(low, (yield low)):
        return trials
    if judge(high, (yield high)):
        return trials
    while high - low > search.tolerance * high:
        middle = (low + high) / 2.0
        if judge(middle, (yield middle)):
            low = middle
        else:
            high = middle
    return trials


def paper(search: PaperProtocol) -> Trials:
    """Yield the grid's rates in order until too many requests fail (section 5.2 of the paper)."""
    trials: list[Trial] = []
    for qps in search.grid:
        summary = yield qps
        answered = summary.endings.get(RequestEnding.ANSWERED, 0)
        trials.append(Trial(qps, summary.requests - answered <= search.max_failures, summary))
        if not trials[-1].held:
            break
    return trials


def sweep(search: Sweep) -> Trials:
    """Yield each number of clients; it holds where every request was answered."""
    trials: list[Trial] = []
    for clients in search.clients:
        summary = yield float(clients)
        answered = summary.endings.get(RequestEnding.ANSWERED, 0)
        left = summary.endings.get(RequestEnding.CANCELLED, 0)
        trials.append(Trial(float(clients), answered + left == summary.requests, summary))
    return trials


def highest_rate(trials: Sequence[Trial]) -> float | None:
    """Return the highest rate that held; None where none did."""
    return max((trial.load for trial in trials if trial.held), default=None)


def trials_of(search: Search) -> Trials:
    """Return the trials of a scenario's search."""
    match search:
        case MaxQps():
            return max_qps(search)
        case PaperProtocol():
            return paper(search)
        case Sweep():
            return sweep(search)
