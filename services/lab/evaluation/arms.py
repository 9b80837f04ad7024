"""The arms compared: keep rates, text mode, the automatic rate, controls and a ceiling."""

from __future__ import annotations

import enum
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ...core.chunks import Chunks
from ...core.selection import Scores


class Chooser(enum.StrEnum):
    """Source of the scores that choose the kept tokens."""

    SPECULATOR = "speculator"
    TEXT = "text"  # the speculator; what is kept goes to the main model as text
    AUTOMATIC = "automatic"  # the speculator, and how many as well
    RANDOM = "random"  # control: chunks at random
    ENDS = "ends"  # control: the first and the last tokens
    EVEN = "even"  # control: chunks at even distances
    MAIN_MODEL = "main_model"  # the ceiling: the model that answers scores for itself
    ORACLE = "oracle"  # the same, by the attention of the right answer's tokens
    PAPER = "paper"  # the speculator by the paper's scorer, where the deployment's is another one
    PAPER_AUTOMATIC = "paper automatic"  # the same with the default settings


CONTROLS = (Chooser.RANDOM, Chooser.ENDS, Chooser.EVEN)
AUTOMATIC = (Chooser.AUTOMATIC, Chooser.PAPER_AUTOMATIC)


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to choose what is kept; `keep` is nominal, and 1 is dense."""

    chooser: Chooser
    keep: float  # (0, 1]; of the automatic arm: not used

    @property
    def is_dense(self) -> bool:
        return self.chooser is Chooser.SPECULATOR and self.keep >= 1.0

    @property
    def name(self) -> str:
        if self.chooser in AUTOMATIC:
            return self.chooser.value
        if self.is_dense:
            return "dense"
        prefix = "keep" if self.chooser is Chooser.SPECULATOR else self.chooser.value
        return f"{prefix} {self.keep:g}"


DENSE = Arm(Chooser.SPECULATOR, 1.0)


def arms_of(
    keeps: Sequence[float],
    control_keep: float | None,
    *,
    automatic: bool,
    ceiling: bool,
    text_keeps: Sequence[float] = (),
    paper: bool = False,
) -> tuple[Arm, ...]:
    """Return dense first, then every keep rate from high to low, then the others.

    `text_keeps` are the rates in text mode; `paper` adds the paper's scorer at every rate; the
    oracle comes with the ceiling.
    """
    rates = sorted({keep for keep in keeps if keep < 1.0}, reverse=True)
    arms = [DENSE, *(Arm(Chooser.SPECULATOR, keep) for keep in rates)]
    as_text = sorted({keep for keep in text_keeps if keep < 1.0}, reverse=True)
    arms += [Arm(Chooser.TEXT, keep) for keep in as_text]
    if automatic:
        arms.append(Arm(Chooser.AUTOMATIC, 1.0))
    if paper:
        arms += [Arm(Chooser.PAPER, keep) for keep in rates]
    if paper and automatic:
        arms.append(Arm(Chooser.PAPER_AUTOMATIC, 1.0))
    if control_keep is not None:
        arms += [Arm(chooser, control_keep) for chooser in CONTROLS]
    if ceiling and control_keep is not None:
        arms += [Arm(Chooser.MAIN_MODEL, control_keep), Arm(Chooser.ORACLE, control_keep)]
    return tuple(arms)


def control_scores(chooser: Chooser, chunks: Chunks, rng: random.Random) -> Scores:
    """Return scores [N] by which the product's own selection chooses as the control does.

    So a control keeps what is protected, and as many chunks beside it as the speculator's
    selection at the same rate. Raises ValueError for a chooser that is no control.
    """
    count = len(chunks.starts)
    if chooser is Chooser.RANDOM:
        ranks = [rng.random() for _ in range(count)]
    elif chooser is Chooser.ENDS:
        ranks = [abs(2 * place + 1 - count) / count for place in range(count)]
    elif chooser is Chooser.EVEN:
        ranks = [1.0 - _bisection_order(place) for place in _spread_chunks(count)]
    else:
        raise ValueError(f"{chooser} is no control")
    scores: Scores = chunks.spread(np.asarray(ranks, dtype=np.float32))
    return scores


def _spread_chunks(chunks: int) -> range:
    """Return the places 1..chunks; place 0 would be first in every order."""
    return range(1, chunks + 1)


def _bisection_order(place: int) -> float:
    """Return Van der Corput's number: the bits of `place`, mirrored behind the point."""
    value, share = 0.0, 0.5
    while place > 0:
        value += share * (place & 1)
        place >>= 1
        share /= 2
    return value
