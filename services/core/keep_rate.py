"""The automatic keep rate: the number of chunks a prompt needs, from its scores. Pure.

A rule counts the chunks that the answer needs, given the scores of those that nothing protects,
highest first. `docs/selection.md` compares rules; `peaks` is the one in use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Descending = NDArray[np.float64]  # [chunks], at least one, finite, not negative, highest first
Rule = Callable[[Descending, float], int]  # and the rule's setting


def peaks(scores: Descending, share: float) -> int:
    """Count the chunks that reach `share` of the highest score."""
    return int(np.count_nonzero(scores >= share * scores[0]))


@dataclass(frozen=True, slots=True)
class AutoKeep:
    """The conditions and the rule by which scores choose the keep rate."""

    least_certainty: float  # of its least sure token; below, it may look at wrong places
    rule: Rule = peaks  # where the draft model is sure of its look-ahead
    setting: float = 0.05
    unsure_share: float = 0.025  # then all chunks that reach this share of the highest; 0: all
    most_chunks: float = 0.6  # share of the open chunks; needing more, the prompt goes dense


def chunks_needed(scores: Descending, auto: AutoKeep, *, sure: bool) -> int:
    """Return the number of chunks the answer needs, at least one."""
    found = auto.rule(scores, auto.setting) if sure else peaks(scores, auto.unsure_share)
    return int(np.clip(found, 1, len(scores)))
