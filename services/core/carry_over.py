"""Append-only selection: a prompt that extends an earlier one keeps what that one kept.

Engines share the KV of equal beginnings only. A selection that is made anew for every turn of a
conversation keeps other tokens each time, so that nothing but the protected beginning is shared.
Here the runs of the turn before stay as they are, in their slots; what the new question needs of
the dropped text follows them, at its original positions, and then the new part. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from .chunks import Chunks
from .selection import (
    Mask,
    Scores,
    SelectionPolicy,
    chunk_worth,
    protected_mask,
    select,
    true_runs,
)
from .types import KeepRange, Plan, PlanKind, Reason, Selection, Span

# Least worth of a dropped chunk that is fetched, as a share of the highest: on conversations about
# facts in a long document, every dropped chunk that an answer needed had more than half of it.
FETCH_FROM = 0.3
UNBOUNDED = KeepRange(0.0, 1.0)
MOST_FETCHED = 0.5  # of the tokens kept before; for more, a new selection is cheaper and in order


@dataclass(frozen=True, slots=True)
class KeptBefore:
    """What an earlier prompt kept, of which this one is a continuation."""

    tokens: int  # F: this many first tokens of both prompts are equal
    runs: tuple[Span, ...]  # disjoint, below F, in the order of their slots
    keep: float | None  # the keep rate that its caller asked for; None: the service chose

    @property
    def kept_tokens(self) -> int:
        """The number of kept tokens."""
        return sum(len(run) for run in self.runs)


def continue_selection(
    scores: Scores,
    plan: Plan,
    protected: Sequence[Span],
    policy: SelectionPolicy,
    certainty: float,
    before: KeptBefore,
    chunks: Chunks | None = None,
    bounds: KeepRange = UNBOUNDED,
) -> Selection:
    """Select as `select`, but keep what was kept `before`, in the same slots.

    `scores` is `[N]`, with N > `before.tokens`. Of the new part everything is kept if it is short
    (`policy.whole_turn_tokens`), else what `select` keeps of it. Dropped chunks that `select` would
    keep now are fetched behind the earlier runs. Where most of the earlier choice does not serve
    the new question, or the plan asks for another keep rate, or the caller's `bounds` of it would
    not hold, the selection is `select`'s.
    """
    chunks = chunks or Chunks.of_equal_length(len(scores), policy.chunk_tokens)
    fresh = select(scores, plan, protected, policy, certainty, chunks)
    if fresh.plan.kind is PlanKind.DENSE:
        return fresh
    anew = replace(fresh, plan=replace(fresh.plan, reason=Reason.RESELECTED))
    if plan.reason is Reason.ASKED and before.keep != plan.keep:
        return anew
    kept = _mask(before.runs, len(scores))
    wanted = _mask(fresh.runs, len(scores))
    must = protected_mask(len(scores), protected, policy)
    worth = chunk_worth(scores, must, policy, chunks)
    worthy = chunks.spread(worth >= FETCH_FROM * worth.max())
    fetched = (must | (wanted & worthy)) & ~kept
    fetched[before.tokens :] = False
    if int(fetched.sum()) > MOST_FETCHED * before.kept_tokens:
        return anew
    new = wanted | must
    new[: before.tokens] = False
    if len(scores) - before.tokens <= policy.whole_turn_tokens:
        new[before.tokens :] = True
    all_kept = int((kept | fetched | new).sum())
    if len(scores) - all_kept < policy.chunk_tokens:
        return anew
    least, most = bounds.floor * len(scores), bounds.ceiling * len(scores)
    if all_kept < min(least, fresh.kept_tokens) or all_kept > max(most, fresh.kept_tokens):
        return anew
    reason = Reason.EXTENDED if bool(fetched.any()) else Reason.CARRIED_OVER
    return Selection(
        len(scores),
        _joined((*before.runs, *true_runs(fetched), *true_runs(new))),
        replace(fresh.plan, reason=reason),
        carried_tokens=before.kept_tokens,
    )


def _joined(runs: Sequence[Span]) -> tuple[Span, ...]:
    """Join each run with the next one where that continues it."""
    joined: list[Span] = []
    for run in runs:
        if joined and joined[-1].stop == run.start:
            joined[-1] = Span(joined[-1].start, run.stop)
        else:
            joined.append(run)
    return tuple(joined)


def _mask(runs: Sequence[Span], tokens: int) -> Mask:
    mask = np.zeros(tokens, dtype=np.bool_)
    for run in runs:
        mask[run.start : run.stop] = True
    return mask
