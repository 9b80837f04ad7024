"""The chunks of a prompt: what is kept or dropped together. Pure.

The paper's chunks have equal lengths and cut through whatever lies on their borders. Those that
follow the text end with lines and sentences where they can, so that a fact is kept or dropped as
a whole.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from .code_lines import NeededChunks

_LINE, _SENTENCE, _PART = 3, 2, 1  # kinds of borders, the best first
_CLOSING = "\"'`)]}*_\u00bb\u201d\u2019"  # may stand between the end of a sentence and its border
# The full-width ones of Chinese and Japanese, which no blank follows, come last.
_SENTENCE_ENDS = (".", "!", "?", "\u3002", "\uff01", "\uff1f")
_PART_ENDS = (",", ";", ":", ")", "]", "}", "\u3001", "\uff0c", "\uff1b", "\uff1a")
# Shortest and longest chunk, in units of the length that is aimed at.
_LEAST, _MOST = 0.5, 1.75


@dataclass(frozen=True, slots=True, eq=False)
class Chunks:
    """Consecutive chunks of a prompt of `tokens` tokens; each begins where the last one ends."""

    starts: NDArray[np.int64]  # [chunks], ascending; the first is 0
    tokens: int
    needed: tuple[NeededChunks, ...] = ()  # by the rest of the code that they are in

    @classmethod
    def of_equal_length(cls, tokens: int, size: int) -> Self:
        """Return chunks of `size` tokens; the last may be shorter."""
        return cls(np.arange(0, tokens, size), tokens)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """The tokens of each, `[chunks]`."""
        return np.diff(self.starts, append=self.tokens)

    @property
    def nbytes(self) -> int:
        """The memory that they take."""
        return self.starts.nbytes + sum(each.nbytes for each in self.needed)

    def sums(self, values: NDArray[Any]) -> NDArray[np.float64]:
        """Add up by chunk, `[N]` -> `[chunks]`."""
        return np.add.reduceat(values, self.starts, dtype=np.float64)

    def count(self, mask: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Count the tokens of a mask by chunk, `[N]` -> `[chunks]`."""
        return np.add.reduceat(mask, self.starts, dtype=np.int64)

    def spread(self, values: NDArray[Any]) -> NDArray[Any]:
        """Give each token its chunk's value, `[chunks]` -> `[N]`."""
        return np.repeat(values, self.sizes)


@dataclass(frozen=True, slots=True, eq=False)
class TextBorders:
    """What each token of a vocabulary says about the borders beside it, `[V + 1]` each.

    The last entry stands for tokens beyond the vocabulary.
    """

    ends: NDArray[np.int8]  # the kind of border that may follow; 0: none
    is_open: NDArray[np.bool_]  # only if the next token begins with a blank
    begins_blank: NDArray[np.bool_]

    @classmethod
    def of(cls, texts: Sequence[str]) -> Self:
        """Read the texts of a vocabulary's tokens, in the order of their ids."""
        known = [*texts, ""]
        ends = np.array([_kind(text) for text in known], dtype=np.int8)
        return cls(
            ends=ends,
            is_open=(ends != _LINE) & np.array(["!" <= text[-1:] <= "~" for text in known]),
            begins_blank=np.array([text[:1].isspace() for text in known]),
        )

    def chunks(self, prompt: Sequence[int], size: int) -> Chunks:
        """Return chunks of about `size` tokens, from half of it to 1.75 times as many.

        Each ends at the best border in its reach, and among equal ones at the one nearest to
        `size`; without any, after `size` tokens. Equal beginnings of prompts have equal chunks, but
        for the last of the shorter one.
        """
        ids = np.minimum(np.asarray(prompt, dtype=np.int64), len(self.ends) - 1)
        places = [np.flatnonzero(self._kinds(ids) == kind) for kind in (_LINE, _SENTENCE, _PART)]
        borders = [(each + 1).tolist() for each in places]
        least, most = max(1, round(_LEAST * size)), max(1, round(_MOST * size))
        starts = [0]
        while len(ids) - starts[-1] > most:
            starts.append(_end(starts[-1], size, least, most, borders))
        return Chunks(np.array(starts, dtype=np.int64), len(ids))

    def _kinds(self, ids: NDArray[np.int64]) -> NDArray[np.int8]:
        """Return the kind of border behind each token, `[N]`."""
        in_word = np.append(~self.begins_blank[ids[1:]], [False])
        kinds: NDArray[np.int8] = np.where(self.is_open[ids] & in_word, 0, self.ends[ids])
        return kinds


def _kind(text: str) -> int:
    if "\n" in text:
        return _LINE
    text = text.rstrip()
    if text.rstrip(_CLOSING).endswith(_SENTENCE_ENDS):
        return _SENTENCE
    return _PART if text.endswith(_PART_ENDS) else 0


def _end(start: int, size: int, least: int, most: int, borders: Sequence[list[int]]) -> int:
    """Return where a chunk ends that begins at `start`."""
    aim = start + size
    for places in borders:
        after = bisect_left(places, aim)
        near = [
            place
            for place in places[max(0, after - 1) : after + 1]
            if start + least <= place <= start + most
        ]
        if near:
            return min(near, key=lambda place: abs(place - aim))
    return aim
