"""Rules that choose a keep rate from the scores, beside `peaks`, the one in use."""

from __future__ import annotations

import enum

import numpy as np

from specprefill.core.keep_rate import Descending, Rule, peaks

TINY = 1e-12


class RuleName(enum.StrEnum):
    """The rules that are compared."""

    MASS = "mass"
    EXCESS = "excess"
    KNEE = "knee"
    SUPPORT = "support"
    PEAKS = "peaks"
    BACKGROUND = "background"


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
