"""Scores a prompt's chunks by the words that they share with what is asked. Pure.

No model reads anything: BM25 over token ids, in milliseconds. It finds what the question names, and
is blind to what it means.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .chunks import Chunks
from .selection import Scores
from .types import Span

QUERY_TOKENS = 256  # of the last protected span, that other chunks are compared with
HALF_TOKENS = 24  # from the end of the query, where its words count half
SATURATION, LENGTH_SHARE = 1.2, 0.75  # k1 and b of BM25
SPACING_SHARE = 1e-2  # of the best chunk's score: spreads chunks that share no word of the query

Tokens = NDArray[np.int64]


def word_scores(
    prompt: Sequence[int],
    asked: Sequence[Span],
    protected: Sequence[Span],
    tail_tokens: int,
    chunks: Chunks,
) -> Scores:
    """Score each token as its chunk, `[N]` -> `[N]` in [0, 1].

    The query is what the request marks as `asked`, else the prompt's end and the last protected
    span, whose words count the less the further they stand from the end: a short question has other
    text before it. A score is the square of a chunk's BM25 as a share of the highest, so that
    chunks stand out as much as by a draft model's attention. Those that share nothing with the
    query have small scores by which any number of them lies evenly spaced.
    """
    ids = np.asarray(prompt, dtype=np.int64)
    query, weights = _query(ids, asked, protected, tail_tokens)
    rated = _bm25(ids, query, weights, chunks.sizes)
    best = float(rated.max())
    shares = rated / best if best > 0.0 else rated
    shares = (shares + SPACING_SHARE * _spacing(len(chunks.starts))) / (1.0 + SPACING_SHARE)
    scores: Scores = chunks.spread(shares**2).astype(np.float32)
    return scores


def _query(
    prompt: Tokens, asked: Sequence[Span], protected: Sequence[Span], tail_tokens: int
) -> tuple[Tokens, NDArray[np.float64]]:
    """Return the query's tokens, ascending, `[words]`, and the highest weight of each."""
    if asked:
        query = np.unique(np.concatenate([prompt[span.start : span.stop] for span in asked]))
        return query, np.ones(len(query))
    parts = [prompt[max(0, len(prompt) - tail_tokens) :]]
    if protected:
        last = protected[-1]
        parts.append(prompt[max(last.start, last.stop - QUERY_TOKENS) : last.stop])
    query, places = np.unique(np.concatenate(parts), return_inverse=True)
    weights = np.zeros(len(query))
    behind = np.concatenate([np.arange(len(part))[::-1] for part in parts])
    np.maximum.at(weights, places, 0.5 ** (behind / HALF_TOKENS))
    return query, weights


def _bm25(
    prompt: Tokens, query: Tokens, weights: NDArray[np.float64], sizes: Tokens
) -> NDArray[np.float64]:
    """Rate each chunk by BM25, `[chunks]` (Robertson and Zaragoza, 2009, section 3).

    Each match is multiplied by its word's weight.
    """
    chunks = len(sizes)
    place = np.minimum(np.searchsorted(query, prompt), len(query) - 1)
    asked = query[place] == prompt
    cells = np.repeat(np.arange(chunks), sizes)[asked] * len(query) + place[asked]
    counts = np.bincount(cells, minlength=chunks * len(query)).reshape(chunks, len(query))
    found_in = (counts > 0).sum(axis=0)
    rarity = np.log1p((chunks - found_in + 0.5) / (found_in + 0.5))
    length = 1.0 - LENGTH_SHARE + LENGTH_SHARE * sizes / sizes.mean()
    matches = counts * (SATURATION + 1.0) / (counts + SATURATION * length[:, None])
    rated: NDArray[np.float64] = matches @ (rarity * weights)
    return rated


def _spacing(chunks: int) -> NDArray[np.float64]:
    """Return values in (0, 1], `[chunks]`; any number of the highest lie evenly spaced.

    The order is van der Corput's: the binary digits of a chunk's number, mirrored.
    """
    order = np.zeros(chunks)
    numbers, half = np.arange(chunks), 0.5
    while numbers.any():
        order += half * (numbers & 1)
        numbers, half = numbers >> 1, half / 2
    return 1.0 - order
