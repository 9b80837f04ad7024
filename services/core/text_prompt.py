"""Text mode: the kept text of a prompt as a prompt of its own, at consecutive positions. Pure.

As in cross-family speculative prefill (arXiv 2603.02631, section 3), runs of kept tokens become
text, joined with a mark where something was dropped, and are tokenised again. Unlike there, tokens
that must survive are not touched: the template's and special tokens stay the tokens that they are,
and so does every stretch between them that nothing was dropped from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from .occurrences import runs
from .protection import Offsets
from .types import Span

# A byte that is part of no character stands in a decoded text as one of these.
_FIRST_ESCAPE, _LAST_ESCAPE = 0xDC80, 0xDCFF
_REPLACEMENT = 0xFFFD
_DROPPED, _FREE, _FIXED = 0, 1, 2

Encode = Callable[[str], Sequence[int] | None]  # None: no tokens read as exactly this text
Mask = NDArray[np.bool_]  # [N]


@dataclass(frozen=True, slots=True)
class GapMark:
    """The text that stands where something was dropped."""

    text: str
    token_ids: tuple[int, ...]  # of the text alone


@dataclass(frozen=True, slots=True)
class PlacedTokens:
    """A prompt, its text, and the place of each token in it."""

    token_ids: Sequence[int]  # [N]
    text: str
    offsets: Offsets  # [N, 2], in characters


@dataclass(frozen=True, slots=True)
class TextPrompt:
    """What is left of a prompt, as a prompt of its own."""

    runs: tuple[Span, ...]  # of the original, widened to whole characters
    token_ids: tuple[int, ...]


def text_prompt(
    prompt: PlacedTokens,
    kept: Sequence[Span],
    fixed: Sequence[Span],
    mark: GapMark,
    encode: Encode,
) -> TextPrompt:
    """Write the kept runs of `prompt` as text, with the mark at each gap.

    `fixed` spans stay tokens, and so do tokens that stand for no text. Where `encode` knows no
    tokens for a text, its own tokens are joined with the mark's.
    """
    states = _states(prompt, kept, fixed)
    token_ids: list[int] = []
    for stretch in _stretches(states):
        token_ids += _write_stretch(prompt, stretch, states, mark, encode)
    spans = tuple(Span(start, stop) for start, stop in runs(states != _DROPPED).tolist())
    return TextPrompt(spans, tuple(token_ids))


def _states(prompt: PlacedTokens, kept: Sequence[Span], fixed: Sequence[Span]) -> NDArray[np.int64]:
    """Return for each token whether it is dropped, free text, or stays as it is, `[N]`.

    Tokens that share a character are in one state.
    """
    is_kept, is_fixed = (_mask(spans, len(prompt.token_ids)) for spans in (kept, fixed))
    is_fixed |= _stands_for_no_text(prompt)
    starts, stops = prompt.offsets[:, 0], prompt.offsets[:, 1]
    first_of_character = np.concatenate(([True], starts[1:] >= stops[:-1]))
    groups = np.flatnonzero(first_of_character)
    states = np.where(is_fixed, _FIXED, _FREE)
    of_group = np.where(
        np.logical_or.reduceat(is_kept, groups), np.maximum.reduceat(states, groups), _DROPPED
    )
    found: NDArray[np.int64] = of_group[np.cumsum(first_of_character) - 1]
    return found


def _mask(spans: Sequence[Span], tokens: int) -> Mask:
    mask = np.zeros(tokens, dtype=np.bool_)
    for span in spans:
        mask[max(0, span.start) : max(0, span.stop)] = True
    return mask


def _stands_for_no_text(prompt: PlacedTokens) -> Mask:
    """Return True for tokens without text, and for bytes that are part of no character."""
    points = np.frombuffer(prompt.text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
    broken = (points == _REPLACEMENT) | ((points >= _FIRST_ESCAPE) & (points <= _LAST_ESCAPE))
    before = np.concatenate(([0], np.cumsum(broken)))
    starts, stops = prompt.offsets[:, 0], prompt.offsets[:, 1]
    return (starts >= stops) | (before[stops] > before[starts])


def _stretches(states: NDArray[np.int64]) -> Iterator[list[Span]]:
    """Yield the prompt in stretches: of fixed tokens, or of free and dropped runs in turn."""
    edges = np.concatenate(([0], np.flatnonzero(np.diff(states)) + 1, [len(states)])).tolist()
    stretch: list[Span] = []
    for start, stop in pairwise(edges):
        run = Span(start, stop)
        if states[start] != _FIXED:
            stretch.append(run)
            continue
        if stretch:
            yield stretch
        yield [run]
        stretch = []
    if stretch:
        yield stretch


def _write_stretch(
    prompt: PlacedTokens,
    stretch: Sequence[Span],
    states: NDArray[np.int64],
    mark: GapMark,
    encode: Encode,
) -> list[int]:
    """Return the tokens of one stretch: as they are, unless something was dropped from it."""
    dropped = [states[run.start] == _DROPPED for run in stretch]
    if not any(dropped):
        return [token for run in stretch for token in prompt.token_ids[run.start : run.stop]]
    pieces = zip(stretch, dropped, strict=True)
    text = "".join(mark.text if gap else _text_of(prompt, run) for run, gap in pieces)
    encoded = encode(text)
    if encoded is not None:
        return list(encoded)
    pieces = zip(stretch, dropped, strict=True)
    return [
        token
        for run, gap in pieces
        for token in (mark.token_ids if gap else prompt.token_ids[run.start : run.stop])
    ]


def _text_of(prompt: PlacedTokens, run: Span) -> str:
    return prompt.text[int(prompt.offsets[run.start, 0]) : int(prompt.offsets[run.stop - 1, 1])]
