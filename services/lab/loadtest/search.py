"""Searches the highest load that a service sustains: the rates to try, and the trials' result.

Pure: rates out, results in. The runs themselves are the caller's.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass

from .outcome import RequestEnding
from .scenario import MaxQps, PaperProtocol
from .statistics import Summary


@dataclass(frozen=True, slots=True)
class Trial:
    """One rate, and whether the service sustained it."""

    qps: float
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


def highest_rate(trials: Sequence[Trial]) -> float | None:
    """Return the highest rate that held; None where none did."""
    return max((trial.qps for trial in trials if trial.held), default=None)


def trials_of(search: MaxQps | PaperProtocol) -> Trials:
    """Return the trials of a scenario's search."""
    return max_qps(search) if isinstance(search, MaxQps) else paper(search)
