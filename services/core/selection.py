"""From token scores to kept tokens (Speculative Prefill, arXiv 2502.02789, section 3.2).

Pure: numpy in, `Selection` out; equal input gives an equal selection on every platform.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from .chunks import Chunks
from .keep_rate import AutoKeep, chunks_needed
from .types import (
    ChunkScores,
    KeepRange,
    Plan,
    PlanKind,
    Reason,
    Selection,
    Span,
    dense_selection,
)

Scores = NDArray[np.float32]  # [N], one score per prompt token
Mask = NDArray[np.bool_]  # [N]

ROUNDING = 1e-9  # so that 0.1 of 30 chunks is 3 of them, not 4
FLAT_SPREAD = 1e-4  # (highest - lowest) / highest chunk score below which nothing was learned


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionPolicy:
    """The tokens that a deployment always keeps, and the chunks that it chooses from the rest."""

    chunk_tokens: int  # of each chunk; where they follow the text, about as many
    min_kept_tokens: int  # absolute floor under any keep rate
    sink_tokens: int  # the first tokens of the prompt, always kept
    tail_tokens: int  # the last tokens of the prompt, always kept
    block_tokens: int  # of the engine's KV cache: a protected prefix ends with a whole block
    # A chunk counts for at least this share of the one before it: the draft model looks at where
    # a fact starts, and the fact continues behind it. 0: as in the paper.
    next_chunk_share: float
    auto: AutoKeep  # where a plan lets the scores choose
    carry_over: bool  # a prompt that extends another one keeps what that one kept
    whole_turn_tokens: int  # new tokens of such a prompt, up to this many, are all kept


def select(
    scores: Scores,
    plan: Plan,
    protected: Sequence[Span],
    policy: SelectionPolicy,
    certainty: float = 1.0,
    chunks: Chunks | None = None,
) -> Selection:
    """Keep the protected tokens and the top chunks by mean score.

    `chunks` None: of `policy.chunk_tokens` tokens each. The mean is over what keeping a chunk would
    add: its tokens that are not protected.

    The budget is `ceil(chunks * plan.keep)` chunks, raised to `min_kept_tokens`; protected tokens
    count toward it one by one, and no chunk is rounded up for them. Scored chunks always get at
    least half of the budget on top of what is protected, so heavy protection makes
    `Selection.keep_rate` exceed `plan.keep` instead of silently pushing the scored text out.

    Where the plan has a range, the scores choose the keep rate, up from its floor; `certainty` in
    [0, 1] is how sure the draft model was of its least sure look-ahead token.

    Ties go to the later chunk. Dense, with its reason, where no whole chunk would be dropped,
    where the scores are flat, where any is not finite, and where the scores are to choose but
    show that pruning would hurt.
    """
    settled = settle(len(scores), plan, protected, policy)
    if settled is not None:
        return settled
    chunks = chunks or Chunks.of_equal_length(len(scores), policy.chunk_tokens)
    if _is_flat(_chunk_means(scores, chunks)):
        return dense_selection(len(scores), Reason.FLAT_SCORES)
    kept = protected_mask(len(scores), protected, policy)
    anything_protected = bool(kept.any())
    worth = chunk_worth(scores, kept, policy, chunks)
    if plan.within is not None:
        chosen = _choose_keep(worth, kept, plan.within, policy, certainty, chunks)
        if isinstance(chosen, Reason):
            return dense_selection(len(scores), chosen)
        plan = replace(plan, keep=chosen)
    kept |= chunks.spread(_choose_chunks(worth, kept, plan, policy, chunks))
    if len(kept) - int(kept.sum()) < policy.chunk_tokens:
        reason = Reason.PROTECTED_SPANS if anything_protected else Reason.KEEP_IS_ONE
        return dense_selection(len(scores), reason)
    return Selection(len(scores), true_runs(kept), plan)


def chunk_scores(
    scores: Scores,
    protected: Sequence[Span],
    policy: SelectionPolicy,
    certainty: float,
    chunks: Chunks | None = None,
) -> ChunkScores:
    """Return the scores by which `select` chooses chunks, whatever the plan.

    Of a prompt with a score that is not finite, which is not pruned, they are all 0.
    """
    chunks = chunks or Chunks.of_equal_length(len(scores), policy.chunk_tokens)
    flat = _is_flat(_chunk_means(scores, chunks))
    usable = np.where(np.isfinite(scores).all(), scores, np.float32(0.0))
    worth = chunk_worth(usable, protected_mask(len(scores), protected, policy), policy, chunks)
    return ChunkScores(tuple(worth.tolist()), certainty, flat, tuple(chunks.starts.tolist()))


def settle(
    prompt_tokens: int, plan: Plan, protected: Sequence[Span], policy: SelectionPolicy
) -> Selection | None:
    """Return the dense selection that no score could change; None: the prompt needs scoring."""
    if prompt_tokens < 1:
        raise ValueError("selection: the prompt is empty")
    if plan.kind is PlanKind.DENSE:
        return dense_selection(prompt_tokens, plan.reason)
    chunks = math.ceil(prompt_tokens / policy.chunk_tokens)
    least = plan.keep if plan.within is None else plan.within.floor
    if _requested_chunks(chunks, least) >= chunks:
        return dense_selection(prompt_tokens, Reason.KEEP_IS_ONE)
    if policy.min_kept_tokens >= prompt_tokens:
        return dense_selection(prompt_tokens, Reason.SHORT_PROMPT)
    free = prompt_tokens - int(protected_mask(prompt_tokens, protected, policy).sum())
    if free < policy.chunk_tokens:
        return dense_selection(prompt_tokens, Reason.PROTECTED_SPANS)
    return None


def budget_chunks(prompt_tokens: int, keep: float, policy: SelectionPolicy) -> int:
    """Return the number of chunks that a keep rate allows, with the absolute floor."""
    chunks = math.ceil(prompt_tokens / policy.chunk_tokens)
    floor = math.ceil(policy.min_kept_tokens / policy.chunk_tokens)
    return min(chunks, max(_requested_chunks(chunks, keep), floor))


def expected_kept(
    prompt_tokens: int, keep: float, protected: Sequence[Span], policy: SelectionPolicy
) -> int:
    """Estimate, without scores, how many tokens `select` would keep."""
    held = int(protected_mask(prompt_tokens, protected, policy).sum())
    budget = budget_chunks(prompt_tokens, keep, policy) * policy.chunk_tokens
    return min(prompt_tokens, max(budget, held + budget // 2))


def leading_tokens(protected: Sequence[Span]) -> int:
    """Count the prompt's first tokens that are protected without a gap."""
    return protected[0].stop if protected and protected[0].start == 0 else 0


def protected_mask(prompt_tokens: int, protected: Sequence[Span], policy: SelectionPolicy) -> Mask:
    """Return the mask of tokens that must survive. Spans are clipped to the prompt.

    A protected prefix of half a block or more is rounded up to whole blocks: engines share the KV
    of whole blocks only, and a block with a gap in it is never shared.
    """
    mask = np.zeros(prompt_tokens, dtype=np.bool_)
    mask[: policy.sink_tokens] = True
    mask[max(0, prompt_tokens - policy.tail_tokens) :] = True
    for span in protected:
        mask[max(0, span.start) : max(0, span.stop)] = True
    leading = prompt_tokens if bool(mask.all()) else int(np.argmin(mask))
    mask[: _whole_blocks(leading, policy.block_tokens)] = True
    return mask


def _requested_chunks(chunks: int, keep: float) -> int:
    return max(1, math.ceil(chunks * keep - ROUNDING))


def _whole_blocks(tokens: int, block_tokens: int) -> int:
    return -(-tokens // block_tokens) * block_tokens if 2 * tokens >= block_tokens else tokens


def _chunk_means(scores: Scores, chunks: Chunks) -> NDArray[np.float64]:
    """Average the scores by chunk, `[N]` -> `[chunks]`."""
    return chunks.sums(scores) / chunks.sizes


def _is_flat(means: NDArray[np.float64]) -> bool:
    """Return True if no chunk stands out. Zero padding distorts the end chunks: ignore them."""
    if not bool(np.isfinite(means).all()):
        return True
    inner = means[1:-1] if len(means) > 2 else means
    return float(np.ptp(inner)) <= FLAT_SPREAD * float(np.abs(inner).max())


def chunk_worth(
    scores: Scores, protected: Mask, policy: SelectionPolicy, chunks: Chunks
) -> NDArray[np.float64]:
    """Score what keeping each chunk would add, `[N]` -> `[chunks]`.

    0: all of it is protected. A chunk that code needs is worth more than any of that code.
    """
    sums = chunks.sums(np.where(protected, 0.0, scores))
    worth: NDArray[np.float64] = sums / np.maximum(chunks.count(~protected), 1)
    worth[1:] = np.maximum(worth[1:], policy.next_chunk_share * worth[:-1])
    for needed in chunks.needed:
        needed.raise_worth(worth)
    return worth


def _choose_keep(
    worth: NDArray[np.float64],
    protected: Mask,
    within: KeepRange,
    policy: SelectionPolicy,
    certainty: float,
    chunks: Chunks,
) -> float | Reason:
    """Return the keep rate that the open chunks need, or the reason to go dense."""
    sure = certainty >= policy.auto.least_certainty
    is_open = chunks.count(~protected) > 0
    highest = np.argsort(-worth[is_open], kind="stable")
    needed = chunks_needed(worth[is_open][highest], policy.auto, sure=sure)
    if needed > policy.auto.most_chunks * len(highest):
        return Reason.SPREAD_SCORES if sure else Reason.UNCERTAIN
    tokens = int(_nominal_sizes(chunks, policy)[is_open][highest[:needed]].sum())
    wanted = (tokens + int(protected.sum())) / len(protected)
    return min(max(wanted, within.floor), within.ceiling)


def _choose_chunks(
    worth: NDArray[np.float64],
    protected: Mask,
    plan: Plan,
    policy: SelectionPolicy,
    chunks: Chunks,
) -> Mask:
    """Return the mask, `[chunks]`, of the fewest top ones that fill the budget.

    The budget is for them and the protected tokens. A short last chunk counts as a whole one, so
    that without protection exactly the paper's number of chunks is taken.
    """
    size = policy.chunk_tokens
    budget = budget_chunks(len(protected), plan.keep, policy)
    free = chunks.count(~protected)
    least = math.ceil(budget / 2) if plan.within is None else 1
    missing = max(budget * size - int(protected.sum()), least * size)
    order = len(worth) - 1 - np.argsort(-worth[::-1], kind="stable")
    open_chunks = order[free[order] > 0]
    added = free + _nominal_sizes(chunks, policy) - chunks.sizes
    filled = np.cumsum(added[open_chunks])
    chosen = np.zeros(len(worth), dtype=np.bool_)
    chosen[open_chunks[: int(np.searchsorted(filled, missing)) + 1]] = True
    return chosen


def _nominal_sizes(chunks: Chunks, policy: SelectionPolicy) -> NDArray[np.int64]:
    """Return the tokens of each chunk, `[chunks]`, as if the last were whole."""
    sizes = chunks.sizes
    sizes[-1] = max(int(sizes[-1]), policy.chunk_tokens)
    return sizes


def true_runs(kept: Mask) -> tuple[Span, ...]:
    """Return the maximal runs of True."""
    edges = np.flatnonzero(np.diff(kept, prepend=False, append=False))
    return tuple(map(Span, edges[::2].tolist(), edges[1::2].tolist()))
