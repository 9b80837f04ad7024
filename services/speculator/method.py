"""The ways to reduce a draft model's attention to scores of prompt tokens."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

Heads = Mapping[int, Sequence[int]]  # a layer's number -> the numbers of its query heads

QUESTION_TOKENS = 64  # the last of the prompt


class Reduction(enum.StrEnum):
    """How the attention of several heads becomes one number."""

    MAXIMUM = "maximum"
    MEAN = "mean"
    SQUARES = "squares"  # the mean of squares, also over the queries: it counts what stands out


class Queries(enum.StrEnum):
    """The tokens whose attention counts."""

    LOOK_AHEAD = "look_ahead"  # the last prompt token and those generated behind it
    QUESTION = "question"  # the last `QUESTION_TOKENS` of the prompt; nothing is generated
    BOTH = "both"  # the mean of the two


@dataclass(frozen=True, slots=True)
class ScoringMethod:
    """Heads, queries and reduction.

    The default is the paper's (Speculative Prefill, arXiv 2502.02789, section 3.2). The mean over a
    few heads that are known to retrieve follows QRHead (arXiv 2506.09944) and Selective-ICR
    (arXiv 2602.22591): the maximum over all heads is that of their noise, too.
    """

    heads: Heads | None = None  # None: all of every layer that sees the whole prompt
    reduction: Reduction = Reduction.MAXIMUM
    queries: Queries = Queries.LOOK_AHEAD

    @property
    def looks_ahead(self) -> bool:
        return self.queries is not Queries.QUESTION

    @property
    def asks_question(self) -> bool:
        return self.queries is not Queries.LOOK_AHEAD

    @property
    def of_echo(self) -> ScoringMethod:
        """How an echo of what is asked scores, which has many more queries than a look-ahead.

        The maximum over all heads of so many is high everywhere.
        """
        if self.reduction is not Reduction.MAXIMUM:
            return self
        return replace(self, reduction=Reduction.SQUARES)

    def counts(self, layer: int) -> bool:
        """Return True if a head of the layer counts."""
        return self.heads is None or layer in self.heads

    def heads_of(self, layer: int) -> Sequence[int] | None:
        """Return the layer's heads that count; None: all of them."""
        return None if self.heads is None else self.heads[layer]


PAPER = ScoringMethod()
