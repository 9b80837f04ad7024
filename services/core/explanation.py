"""Explains a selection: which spans of the prompt are kept, and why. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .chunks import Chunks
from .protection import KeptBy
from .selection import SelectionPolicy, protected_mask
from .types import PlanKind, Selection, Span

Reasons = NDArray[np.int32]  # [N], one bit per reason

_ORDER = tuple(KeptBy)  # of the bits, and of the reasons of a span


@dataclass(frozen=True, slots=True)
class ExplainedSpan:
    """Some tokens of one chunk that are kept, or dropped, for the same reasons."""

    tokens: Span
    chunk: int
    reasons: tuple[KeptBy, ...]  # (): dropped

    @property
    def is_kept(self) -> bool:
        return bool(self.reasons)


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole prompt as spans, in order, without gaps."""

    spans: tuple[ExplainedSpan, ...]
    threshold: float | None  # lowest score of a chunk that was kept for its score; None: none was


def explain(
    selection: Selection, protected: Mapping[KeptBy, Sequence[Span]], policy: SelectionPolicy
) -> Explanation:
    """Explain every token of a selection that was made with `protected` and `policy`.

    Spans end where a chunk ends and where the reasons change. A chunk's unprotected tokens are
    one fate: at another keep rate, the same spans are kept or dropped as wholes.
    """
    reasons = _protection_reasons(selection.prompt_tokens, protected, policy)
    kept = _kept_mask(selection)
    reasons[~kept] = 0
    reasons[kept & (reasons == 0)] = _bit(_own_reason(selection))
    spans = tuple(_spans(reasons, _chunk_starts(selection, policy)))
    return Explanation(spans, _threshold(selection, spans))


def _protection_reasons(
    prompt_tokens: int, protected: Mapping[KeptBy, Sequence[Span]], policy: SelectionPolicy
) -> Reasons:
    reasons = np.zeros(prompt_tokens, dtype=np.int32)
    tail = Span(max(0, prompt_tokens - policy.tail_tokens), prompt_tokens)
    rules = [
        *protected.items(),
        (KeptBy.SINK, [Span(0, policy.sink_tokens)]),
        (KeptBy.TAIL, [tail]),
    ]
    for reason, spans in rules:
        for span in spans:
            reasons[span.start : span.stop] |= _bit(reason)
    every = [span for spans in protected.values() for span in spans]
    rounded_up = protected_mask(prompt_tokens, every, policy) & (reasons == 0)
    reasons[rounded_up] = _bit(KeptBy.BLOCK)
    return reasons


def _bit(reason: KeptBy) -> int:
    return 1 << _ORDER.index(reason)


def _kept_mask(selection: Selection) -> NDArray[np.bool_]:
    kept = np.zeros(selection.prompt_tokens, dtype=np.bool_)
    for run in selection.runs:
        kept[run.start : run.stop] = True
    return kept


def _own_reason(selection: Selection) -> KeptBy:
    """Return the reason for tokens that nothing protects."""
    if selection.plan.kind is PlanKind.DENSE:
        return KeptBy.WHOLE_PROMPT
    return KeptBy.STATIC if selection.scores is None else KeptBy.SCORED


def _chunk_starts(selection: Selection, policy: SelectionPolicy) -> NDArray[np.int64]:
    """Return the first token of each chunk."""
    if selection.scores is not None:
        return np.array(selection.scores.starts, dtype=np.int64)
    return Chunks.of_equal_length(selection.prompt_tokens, policy.chunk_tokens).starts


def _spans(reasons: Reasons, chunk_starts: NDArray[np.int64]) -> Iterator[ExplainedSpan]:
    changes = np.flatnonzero(np.diff(reasons)) + 1
    starts = np.union1d(changes, chunk_starts)
    chunks = np.searchsorted(chunk_starts, starts, side="right") - 1
    names = {bits: _names(bits) for bits in np.unique(reasons).tolist()}
    edges = [*starts.tolist(), len(reasons)]
    for place, chunk in enumerate(chunks.tolist()):
        start, stop = edges[place], edges[place + 1]
        yield ExplainedSpan(Span(start, stop), chunk, names[int(reasons[start])])


def _names(bits: int) -> tuple[KeptBy, ...]:
    return tuple(reason for reason in _ORDER if bits & _bit(reason))


def _threshold(selection: Selection, spans: Sequence[ExplainedSpan]) -> float | None:
    if selection.scores is None:
        return None
    worth = selection.scores.worth
    return min((worth[each.chunk] for each in spans if KeptBy.SCORED in each.reasons), default=None)
