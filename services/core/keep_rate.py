"""The automatic keep rate: the number of chunks a prompt needs, from its scores. Pure.

A rule looks at the scores of the chunks that nothing protects, highest first, and returns how many
of them the answer needs. `docs/selection.md` compares the rules and explains why `PEAKS` is the one
in use.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Descending = NDArray[np.float64]  # [chunks], at least one, finite, not negative, highest first
Rule = Callable[[Descending, float], int]  # and the rule's setting

TINY = 1e-12


class RuleName(enum.StrEnum):
    """The rules that were compared."""

    MASS = "mass"
    EXCESS = "excess"
    KNEE = "knee"
    SUPPORT = "support"
    PEAKS = "peaks"
    BACKGROUND = "background"


@dataclass(frozen=True, slots=True)
class AutoKeep:
    """The conditions and the rule by which scores choose the keep rate."""

    rule: RuleName = RuleName.PEAKS  # where the draft model is sure of its look-ahead
    setting: float = 0.05
    least_certainty: float = 0.95  # of its least sure token; below, it may look at wrong places
    unsure_share: float = 0.025  # then all chunks that reach this share of the highest; 0: all
    most_chunks: float = 0.6  # share of the open chunks; needing more, the prompt goes dense


def chunks_needed(scores: Descending, auto: AutoKeep, *, sure: bool) -> int:
    """Return the number of chunks the answer needs, at least one."""
    found = RULES[auto.rule](scores, auto.setting) if sure else peaks(scores, auto.unsure_share)
    return int(np.clip(found, 1, len(scores)))


def mass(scores: Descending, share: float) -> int:
    """Count the fewest chunks that hold `share` of the sum of scores."""
    return int(np.searchsorted(np.cumsum(scores), share * scores.sum())) + 1


def excess(scores: Descending, share: float) -> int:
    """Count the fewest chunks that hold `share` of the excess over the median."""
    return mass(np.maximum(scores - np.median(scores), 0.0), share)


def knee(scores: Descending, scale: float) -> int:
    """Scale the index where the sorted curve is farthest below its first-to-last line.

    (Kneedle, Satopaa et al. 2011, section 4, without smoothing.)
    """
    across = np.linspace(0.0, 1.0, len(scores))
    down = (scores - scores[-1]) / max(float(scores[0] - scores[-1]), TINY)
    return int(np.ceil(scale * (1 + np.argmax(1.0 - across - down))))


def support(scores: Descending, scale: float) -> int:
    """Scale the effective number of chunks: e to the entropy of the scores."""
    shares = scores / max(float(scores.sum()), TINY)
    entropy = -float(np.sum(shares * np.log(shares + TINY)))
    return int(np.ceil(scale * np.exp(entropy)))


def peaks(scores: Descending, share: float) -> int:
    """Count the chunks that reach `share` of the highest score."""
    return int(np.count_nonzero(scores >= share * scores[0]))


def background(scores: Descending, factor: float) -> int:
    """Count the chunks that reach `factor` times the median score."""
    return int(np.count_nonzero(scores >= factor * np.median(scores)))


RULES: dict[RuleName, Rule] = {
    RuleName.MASS: mass,
    RuleName.EXCESS: excess,
    RuleName.KNEE: knee,
    RuleName.SUPPORT: support,
    RuleName.PEAKS: peaks,
    RuleName.BACKGROUND: background,
}
