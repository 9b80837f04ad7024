"""Compares ways to score prompts by what they keep of the gold, and chooses one. Pure."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ...core.chunks import Chunks
from ...core.selection import Scores, SelectionPolicy, select
from ...core.types import KeepRange, Plan, PlanKind, Reason, Selection, Span
from ...speculator.method import ScoringMethod
from ..evaluation.gold import survival

KEEPS = (0.3, 0.2, 0.1)
# Of a family's gold: a way that keeps this much less than the paper's, and more than one prompt's
# less, is never chosen.
WORST_LOSS = 0.05
AS_GOOD = 0.01  # of mean survival: no difference between two ways
LEAST_CERTAINTIES = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95)
PEAK_SHARES = (0.02, 0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3)
ENOUGH = 0.97  # survival of the gold of prompts that can be pruned


@dataclass(frozen=True, slots=True)
class Candidate:
    """A way to score, and its cost as a share of the paper's."""

    name: str
    method: ScoringMethod
    cost: float


@dataclass(frozen=True, slots=True)
class ScoredTask:
    """One prompt as the selection sees it, scored in every way."""

    family: str
    protected: tuple[Span, ...]
    gold: tuple[Span, ...]  # empty: the answer needs all of the prompt
    scores: Mapping[str, Scores]  # by candidate
    certainty: float
    chunks: Chunks | None = None  # None: of equal lengths

    @property
    def tokens(self) -> int:
        return len(next(iter(self.scores.values())))


@dataclass(frozen=True, slots=True)
class Survival:
    """The share of gold spans that a candidate keeps whole, by family and keep rate."""

    candidate: Candidate
    families: Mapping[str, tuple[float, ...]]  # in the order of `KEEPS`
    prompts: int  # of the family with the fewest

    @property
    def mean(self) -> float:
        return statistics.fmean(share for shares in self.families.values() for share in shares)

    def at(self, place: int) -> float:
        """Return the mean over the families at one keep rate."""
        return statistics.fmean(shares[place] for shares in self.families.values())

    def worst_loss(self, other: Survival) -> float:
        """Return the most that a family loses beside `other`, on average over the keep rates."""
        return max(
            statistics.fmean(theirs) - statistics.fmean(self.families[family])
            for family, theirs in other.families.items()
        )


@dataclass(frozen=True, slots=True)
class AutomaticRate:
    """Settings of the automatic keep rate, and what they do.

    A prompt can be pruned if half of it, chosen by the same scores, has all of its gold. The others
    need all of their tokens, or the draft does not find what they need: they should go dense.
    """

    least_certainty: float
    peak_share: float
    kept: float  # mean share of the tokens over the families
    survival: float  # of the gold of prompts that can be pruned
    pruned: int  # of these
    can_be_pruned: int
    sent_dense: int  # of the others
    others: int

    @property
    def merit(self) -> float:
        """Youden's J, in [-1, 1]: 1 if the right prompts are pruned, 0 for a blind choice."""
        pruned = self.pruned / max(1, self.can_be_pruned)
        dense = self.sent_dense / self.others if self.others else 1.0
        return pruned + dense - 1.0


def survivals(
    candidates: Sequence[Candidate], tasks: Sequence[ScoredTask], policy: SelectionPolicy
) -> list[Survival]:
    """Return what each candidate keeps of the tasks that have gold."""
    families = list(dict.fromkeys(task.family for task in tasks if task.gold))
    return [
        Survival(
            candidate,
            {
                family: tuple(
                    statistics.fmean(
                        survival(task.gold, _fixed(task, candidate, keep, policy))
                        for task in tasks
                        if task.family == family
                    )
                    for keep in KEEPS
                )
                for family in families
            },
            min(sum(task.family == family for task in tasks) for family in families),
        )
        for candidate in candidates
    ]


def choose(found: Sequence[Survival]) -> Survival:
    """Return the best of them; the first, the paper's, unless another one keeps more or is cheaper.

    Of those that are nearly as good as the best, the cheapest; the paper's among equals.
    """
    paper = found[0]
    most_lost = max(WORST_LOSS, 1 / paper.prompts)
    allowed = [each for each in found if each.worst_loss(paper) <= most_lost]
    best = max(allowed, key=lambda each: each.mean)
    as_good = [each for each in allowed if each.mean >= best.mean - AS_GOOD]
    if paper in as_good and paper.candidate.cost <= min(each.candidate.cost for each in as_good):
        return paper
    return min(as_good, key=lambda each: (each.candidate.cost, -each.mean))


def automatic_rate(
    candidate: Candidate, tasks: Sequence[ScoredTask], policy: SelectionPolicy, within: KeepRange
) -> AutomaticRate:
    """Return the settings that best tell which prompts can be pruned, and keep enough of these.

    Of equally good ones, those that keep the fewest tokens.
    """
    certainties = LEAST_CERTAINTIES if candidate.method.looks_ahead else (0.0,)
    rates = [
        _automatic(candidate, tasks, replace(policy, auto=auto), within)
        for least in certainties
        for share in PEAK_SHARES
        for auto in [replace(policy.auto, least_certainty=least, setting=share)]
    ]
    return max(rates, key=lambda each: (min(each.survival, ENOUGH), each.merit, -each.kept))


def _automatic(
    candidate: Candidate, tasks: Sequence[ScoredTask], policy: SelectionPolicy, within: KeepRange
) -> AutomaticRate:
    plan = Plan(PlanKind.PRUNE, Reason.AUTO, within=within)
    kept: dict[str, list[float]] = {}
    survived: list[float] = []
    pruned = sent_dense = 0
    for task in tasks:
        scores = task.scores[candidate.name]
        chosen = select(scores, plan, task.protected, policy, task.certainty, task.chunks)
        kept.setdefault(task.family, []).append(chosen.keep_rate)
        is_pruned = chosen.plan.kind is PlanKind.PRUNE
        if _can_be_pruned(task, candidate, policy):
            survived.append(survival(task.gold, chosen))
            pruned += is_pruned
        else:
            sent_dense += not is_pruned
    return AutomaticRate(
        least_certainty=policy.auto.least_certainty,
        peak_share=policy.auto.setting,
        kept=statistics.fmean(statistics.fmean(some) for some in kept.values()),
        survival=statistics.fmean(survived) if survived else 1.0,
        pruned=pruned,
        can_be_pruned=len(survived),
        sent_dense=sent_dense,
        others=len(tasks) - len(survived),
    )


def _can_be_pruned(task: ScoredTask, candidate: Candidate, policy: SelectionPolicy) -> bool:
    """Return True if half of the prompt, chosen by these scores, has all of the gold."""
    return bool(task.gold) and survival(task.gold, _fixed(task, candidate, 0.5, policy)) == 1.0


def _fixed(
    task: ScoredTask, candidate: Candidate, keep: float, policy: SelectionPolicy
) -> Selection:
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, keep)
    return select(task.scores[candidate.name], plan, task.protected, policy, chunks=task.chunks)
