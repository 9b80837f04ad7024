"""How much of what an answer needs a selection keeps. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from ...core.types import Selection, Span


def survival(gold: Sequence[Span], chosen: Selection) -> float:
    """Return the share of gold spans kept whole; without any, the share of the prompt."""
    if not gold:
        return chosen.keep_rate
    whole = [
        any(run.start <= span.start and span.stop <= run.stop for run in chosen.runs)
        for span in gold
    ]
    return sum(whole) / len(whole)
