"""How many chunks a prompt needs, told by its scores: the automatic keep rate. Pure.

A rule looks at the scores of the chunks that nothing protects, highest first, and says how many of
them carry what the answer needs. `docs/selection.md` compares the rules and says why `PEAKS` is the
one in use.
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
    """When the scores may choose the keep rate, and how."""

    rule: RuleName = RuleName.PEAKS  # where the draft model is sure of its look-ahead
    setting: float = 0.05
    least_certainty: float = 0.95  # of its least sure token; below, it may look at wrong places
    unsure_share: float = 0.025  # then all chunks that reach this share of the highest; 0: all
    most_chunks: float = 0.6  # share of the open chunks; needing more, the prompt goes dense


def needed(scores: Descending, auto: AutoKeep, *, sure: bool) -> int:
    """How many of the chunks the answer needs, at least one."""
    found = RULES[auto.rule](scores, auto.setting) if sure else peaks(scores, auto.unsure_share)
    return int(np.clip(found, 1, len(scores)))


def mass(scores: Descending, share: float) -> int:
    """The fewest chunks that hold `share` of the sum of scores."""
    return int(np.searchsorted(np.cumsum(scores), share * scores.sum())) + 1


def excess(scores: Descending, share: float) -> int:
    """The fewest chunks that hold `share` of what stands out from the median."""
    return mass(np.maximum(scores - np.median(scores), 0.0), share)


def knee(scores: Descending, scale: float) -> int:
    """`scale` times where the sorted curve is farthest below the line from its first to its last.

    (Kneedle, Satopaa et al. 2011, section 4, without smoothing.)
    """
    across = np.linspace(0.0, 1.0, len(scores))
    down = (scores - scores[-1]) / max(float(scores[0] - scores[-1]), TINY)
    return int(np.ceil(scale * (1 + np.argmax(1.0 - across - down))))


def support(scores: Descending, scale: float) -> int:
    """`scale` times the effective number of chunks: e to the entropy of the scores."""
    shares = scores / max(float(scores.sum()), TINY)
    entropy = -float(np.sum(shares * np.log(shares + TINY)))
    return int(np.ceil(scale * np.exp(entropy)))


def peaks(scores: Descending, share: float) -> int:
    """The chunks that reach `share` of the highest one."""
    return int(np.count_nonzero(scores >= share * scores[0]))


def background(scores: Descending, factor: float) -> int:
    """The chunks that reach `factor` times the median."""
    return int(np.count_nonzero(scores >= factor * np.median(scores)))


RULES: dict[RuleName, Rule] = {
    RuleName.MASS: mass,
    RuleName.EXCESS: excess,
    RuleName.KNEE: knee,
    RuleName.SUPPORT: support,
    RuleName.PEAKS: peaks,
    RuleName.BACKGROUND: background,
}
