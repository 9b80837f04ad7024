"""The fallback for a prompt that the speculator could not score in time.

It is not a dense prefill, unless a deployment chooses that: a dense prompt is 1 / keep times the
work of a pruned one, for a pool that was sized for pruned ones, at the very moment of overload.
Pure: no clock, no I/O.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .errors import Overloaded
from .selection import Scores, SelectionPolicy, select
from .types import Plan, Reason, Request, Selection, dense_selection

NOMINAL_KEEP = 0.3  # of a plan whose rate the scores would have chosen
QUERY_TOKENS = 256  # of the last protected span, that other chunks are compared with
SATURATION, LENGTH_SHARE = 1.2, 0.75  # k1 and b of BM25
SPACING_SHARE = 1e-2  # of the best chunk's score: spreads chunks that share no word of the query
_MESSAGES = {
    Reason.SPECULATOR_OVERLOADED: "the speculator pool is full",
    Reason.SPECULATOR_TIMEOUT: "the prompt could not be scored in time",
}


class OnOverload(enum.StrEnum):
    """The policies for a prompt without scores."""

    SHED = "shed"  # 429, with a time to try again
    STATIC = "static"  # pruned at the nominal rate, chosen by the query's words
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Patience:
    """The time that scoring a prompt may take, queueing included."""

    base_s: float = 10.0
    token_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        """Return the limit for a prompt of `tokens` tokens."""
        return self.base_s + self.token_s * tokens


@dataclass(frozen=True, slots=True)
class Fallback:
    """A deployment's policy for prompts without scores."""

    on_overload: OnOverload = OnOverload.SHED
    policy: SelectionPolicy | None = None  # of the static selection

    def __post_init__(self) -> None:
        if self.on_overload is OnOverload.STATIC and self.policy is None:
            raise ValueError("fallback: a static selection needs a policy")

    def selection(
        self, request: Request, plan: Plan, reason: Reason, retry_after_s: float
    ) -> Selection:
        """Return the selection without scores. Raises Overloaded where the policy is to shed."""
        match self.on_overload:
            case OnOverload.DENSE:
                return dense_selection(len(request.prompt), reason)
            case OnOverload.STATIC if self.policy is not None:
                static = replace(plan, reason=reason, keep=_nominal_keep(plan), within=None)
                return static_selection(request, static, self.policy)
            case _:
                message = f"{_MESSAGES[reason]}; try again later"
                raise Overloaded(message, retry_after_s, reason.value)


def static_selection(request: Request, plan: Plan, policy: SelectionPolicy) -> Selection:
    """Keep what is always kept, and the chunks that share most words with the query.

    The query is the prompt's end, or what the request marks as asked. Chunks are rated by BM25 over
    token ids; those that share nothing with it are taken evenly spaced. It reads no model, and
    takes milliseconds.
    """
    prompt = np.asarray(request.prompt, dtype=np.int64)
    query = np.unique(np.concatenate(_query_parts(prompt, request, policy)))
    return select(_static_scores(prompt, query, policy), plan, request.protected, policy)


def _nominal_keep(plan: Plan) -> float:
    if plan.within is None:
        return plan.keep
    return min(plan.within.ceiling, max(plan.within.floor, NOMINAL_KEEP))


def _static_scores(
    prompt: NDArray[np.int64], query: NDArray[np.int64], policy: SelectionPolicy
) -> Scores:
    """Score each token as its chunk, `[N]` -> `[N]`."""
    starts = np.arange(0, len(prompt), policy.chunk_tokens)
    sizes = np.diff(starts, append=len(prompt))
    rated = _bm25(prompt, query, sizes)
    best = float(rated.max())
    spaced = _spacing(len(sizes)) * (SPACING_SHARE * best if best > 0.0 else 1.0)
    return np.repeat(rated + spaced, sizes).astype(np.float32)


def _query_parts(
    prompt: NDArray[np.int64], request: Request, policy: SelectionPolicy
) -> list[NDArray[np.int64]]:
    """Return what is asked, or the prompt's end: its tail and the last protected span."""
    if request.asked:
        return [prompt[span.start : span.stop] for span in request.asked]
    tail = [prompt[max(0, len(prompt) - policy.tail_tokens) :]]
    if request.protected:
        last = request.protected[-1]
        tail.append(prompt[max(last.start, last.stop - QUERY_TOKENS) : last.stop])
    return tail


def _bm25(
    prompt: NDArray[np.int64], query: NDArray[np.int64], sizes: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Rate each chunk by BM25, `[chunks]` (Robertson and Zaragoza, 2009, section 3)."""
    chunks = len(sizes)
    place = np.minimum(np.searchsorted(query, prompt), len(query) - 1)
    asked = query[place] == prompt
    cells = np.repeat(np.arange(chunks), sizes)[asked] * len(query) + place[asked]
    counts = np.bincount(cells, minlength=chunks * len(query)).reshape(chunks, len(query))
    found_in = (counts > 0).sum(axis=0)
    rarity = np.log1p((chunks - found_in + 0.5) / (found_in + 0.5))
    length = 1.0 - LENGTH_SHARE + LENGTH_SHARE * sizes / sizes.mean()
    matches = counts * (SATURATION + 1.0) / (counts + SATURATION * length[:, None])
    rated: NDArray[np.float64] = matches @ rarity
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
