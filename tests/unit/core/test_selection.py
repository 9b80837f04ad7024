"""The kept part of a prompt: budget, protection, ties and the reasons to go dense."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.core.keep_rate import AutoKeep
from specprefill.core.selection import Scores, SelectionPolicy, budget_chunks, select, settle
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Selection, Span
from tests.policies import PAPER

BARE = replace(PAPER, chunk_tokens=32, min_kept_tokens=1, sink_tokens=0, tail_tokens=0)


def prune(keep: float) -> Plan:
    return Plan(PlanKind.PRUNE, Reason.ASKED, keep)


def positions(selection: Selection) -> set[int]:
    return {index for run in selection.runs for index in range(run.start, run.stop)}


def random_scores(tokens: int, seed: int) -> Scores:
    return np.random.default_rng(seed).random(tokens, dtype=np.float32)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Scores, float, tuple[Span, ...], SelectionPolicy]:
    tokens = draw(st.integers(1, 600))
    edges = st.tuples(st.integers(0, tokens - 1), st.integers(1, 200))
    spans = tuple(
        Span(start, min(tokens, start + size)) for start, size in draw(st.lists(edges, max_size=4))
    )
    policy = replace(
        PAPER,
        chunk_tokens=draw(st.sampled_from([1, 7, 16, 32])),
        min_kept_tokens=draw(st.integers(1, 300)),
        sink_tokens=draw(st.integers(0, 20)),
        tail_tokens=draw(st.integers(0, 80)),
        block_tokens=draw(st.sampled_from([1, 16, 128])),
    )
    levels = draw(st.sampled_from([2, 1000]))  # two levels: ties everywhere
    scores = np.random.default_rng(draw(st.integers(0, 99))).integers(0, levels, tokens)
    keep = draw(st.floats(0.01, 1.0))
    return scores.astype(np.float32), keep, spans, policy


@given(cases())
def test_protected_tokens_always_survive(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy],
) -> None:
    scores, keep, spans, policy = case
    kept = positions(select(scores, prune(keep), spans, policy))
    tokens = len(scores)
    assert kept >= set(range(min(policy.sink_tokens, tokens)))
    assert kept >= set(range(max(0, tokens - policy.tail_tokens), tokens))
    assert all(kept >= set(range(span.start, span.stop)) for span in spans)


@given(cases())
def test_runs_are_sorted_disjoint_and_not_adjacent(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy],
) -> None:
    scores, keep, spans, policy = case
    selection = select(scores, prune(keep), spans, policy)
    assert selection.prompt_tokens == len(scores)
    assert selection.runs[0].start >= 0
    assert selection.runs[-1].stop <= len(scores)
    assert all(len(run) > 0 for run in selection.runs)
    assert all(
        left.stop < right.start
        for left, right in zip(selection.runs, selection.runs[1:], strict=False)
    )


@given(cases())
def test_the_budget_is_filled(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy],
) -> None:
    scores, keep, spans, policy = case
    selection = select(scores, prune(keep), spans, policy)
    padding = -len(scores) % policy.chunk_tokens
    budget = budget_chunks(len(scores), keep, policy) * policy.chunk_tokens
    assert selection.kept_tokens + padding >= budget
    assert selection.kept_tokens >= min(policy.min_kept_tokens, len(scores)) - padding


@given(cases(), st.floats(0.01, 1.0))
def test_a_higher_keep_rate_keeps_a_superset(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy], other: float
) -> None:
    scores, keep, spans, policy = case
    low, high = sorted((keep, other))
    less = positions(select(scores, prune(low), spans, policy))
    more = positions(select(scores, prune(high), spans, policy))
    assert less <= more


@given(cases())
@settings(max_examples=30)
def test_selection_is_deterministic_and_leaves_its_input_alone(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy],
) -> None:
    scores, keep, spans, policy = case
    before = scores.copy()
    assert select(scores, prune(keep), spans, policy) == select(
        before.copy(), prune(keep), spans, policy
    )
    assert np.array_equal(scores, before)


@given(cases())
def test_a_pruned_selection_drops_a_chunk_at_least(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy],
) -> None:
    scores, keep, spans, policy = case
    selection = select(scores, prune(keep), spans, policy)
    if selection.plan.kind is PlanKind.PRUNE:
        assert selection.prompt_tokens - selection.kept_tokens >= policy.chunk_tokens
        assert selection.plan.keep == keep
    else:
        assert selection.runs == (Span(0, len(scores)),)


@pytest.mark.parametrize("keep", [0.01, 0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("tokens", [320, 960, 1000])
def test_without_protection_exactly_the_papers_chunks_are_kept(keep: float, tokens: int) -> None:
    scores = random_scores(tokens, seed=tokens)
    chunks = math.ceil(tokens / 32)
    means = [float(scores[32 * i : 32 * i + 32].mean()) for i in range(chunks)]
    top = sorted(range(chunks), key=lambda i: means[i])[-math.ceil(round(chunks * keep, 9)) :]
    expected = {token for i in top for token in range(32 * i, min(tokens, 32 * i + 32))}
    assert positions(select(scores, prune(keep), (), BARE)) == expected


def test_ties_go_to_the_later_chunk() -> None:
    levels = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0]
    scores = np.repeat(np.array(levels, dtype=np.float32), 32)
    assert select(scores, prune(2 / 6), (), BARE).runs == (Span(64, 96), Span(128, 160))
    assert select(scores, prune(4 / 6), (), BARE).runs == (Span(32, 96), Span(128, 192))


def test_protection_counts_toward_the_budget_token_by_token() -> None:
    scores = random_scores(3200, seed=1)
    selection = select(scores, prune(0.3), (Span(100, 111),), BARE)
    assert 960 <= selection.kept_tokens <= 960 + 32


def test_protection_beyond_the_budget_leaves_half_of_it_to_the_scores() -> None:
    scores = np.zeros(3200, dtype=np.float32)
    scores[3000:3072] = 1.0
    scores[2000:2040] = 0.5
    selection = select(scores, prune(0.1), (Span(0, 1600),), BARE)
    assert selection.kept_tokens == 1600 + 5 * 32
    assert selection.keep_rate > selection.plan.keep
    assert positions(selection) >= set(range(3008, 3072))


def test_spans_beyond_the_prompt_are_clipped() -> None:
    selection = select(random_scores(640, 2), prune(0.2), (Span(630, 900), Span(700, 800)), BARE)
    assert selection.runs[-1].stop == 640


@pytest.mark.parametrize(
    ("plan", "protected", "policy", "reason"),
    [
        (prune(1.0), (), BARE, Reason.KEEP_IS_ONE),
        (prune(0.99), (), BARE, Reason.KEEP_IS_ONE),
        (prune(0.3), (Span(0, 620),), BARE, Reason.PROTECTED_SPANS),
        (prune(0.3), (), replace(PAPER, min_kept_tokens=640), Reason.SHORT_PROMPT),
        (Plan(PlanKind.DENSE, Reason.DISABLED), (), BARE, Reason.DISABLED),
    ],
)
def test_selections_that_no_score_can_change_need_no_scores(
    plan: Plan, protected: tuple[Span, ...], policy: SelectionPolicy, reason: Reason
) -> None:
    settled = settle(640, plan, protected, policy)
    assert settled is not None
    assert (settled.plan.kind, settled.plan.reason) == (PlanKind.DENSE, reason)
    assert select(random_scores(640, 3), plan, protected, policy) == settled


@pytest.mark.parametrize("value", [0.0, 1.0, 3e-5])
def test_flat_scores_keep_everything(value: float) -> None:
    selection = select(np.full(640, value, dtype=np.float32), prune(0.3), (), BARE)
    assert selection.plan == Plan(PlanKind.DENSE, Reason.FLAT_SCORES)


def test_uniform_attention_is_flat_although_pooling_distorts_its_ends() -> None:
    uniform = np.convolve(np.full(640, 1 / 640), np.full(13, 1 / 13), mode="same")
    selection = select(uniform.astype(np.float32), prune(0.3), (), BARE)
    assert selection.plan.reason is Reason.FLAT_SCORES


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_score_that_is_not_finite_keeps_everything(bad: float) -> None:
    scores = random_scores(640, seed=4)
    scores[333] = bad
    assert select(scores, prune(0.3), (), BARE).plan.reason is Reason.FLAT_SCORES


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        select(np.empty(0, dtype=np.float32), prune(0.3), (), BARE)


def automatic(floor: float = 0.05, ceiling: float = 1.0) -> Plan:
    return Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(floor, ceiling))


def peaked_scores(tokens: int, peaks: int, high: float = 1.0) -> Scores:
    scores = random_scores(tokens, seed=9) * np.float32(0.01)
    for peak in range(peaks):
        scores[320 * peak + 64 : 320 * peak + 96] += high
    return scores


def test_the_scores_choose_as_much_as_they_need():
    policy = replace(BARE, auto=AutoKeep(least_certainty=0.95, setting=0.1))
    for peaks in (2, 5):
        selection = select(peaked_scores(3200, peaks), automatic(floor=0.01), (), policy)
        assert selection.kept_tokens == 32 * peaks
        assert selection.plan.keep == pytest.approx(peaks / 100)
        assert selection.plan.reason is Reason.AUTO


def test_the_floor_and_the_ceiling_hold():
    scores = peaked_scores(3200, 5)
    assert select(scores, automatic(floor=0.2), (), BARE).kept_tokens == 640
    assert select(scores, automatic(floor=0.01, ceiling=0.03), (), BARE).kept_tokens == 96


def test_protection_comes_on_top_of_what_the_scores_need():
    policy = replace(BARE, auto=AutoKeep(least_certainty=0.95, setting=0.1))
    selection = select(peaked_scores(3200, 5), automatic(), (Span(1600, 2560),), policy)
    assert selection.kept_tokens == 960 + 160


def test_scores_that_want_most_of_the_prompt_get_all_of_it():
    scores = np.linspace(0.9, 1.0, 3200, dtype=np.float32)
    assert select(scores, automatic(), (), BARE).plan.reason is Reason.SPREAD_SCORES
    assert select(scores, prune(0.3), (), BARE).keep_rate == pytest.approx(0.3)


def test_a_guessing_speculator_keeps_whatever_might_matter() -> None:
    scores = peaked_scores(3200, 2)
    scores[1600:1760] += 0.06
    policy = replace(BARE, auto=AutoKeep(least_certainty=0.95, setting=0.5))
    sure = select(scores, automatic(floor=0.01), (), policy)
    guessing = select(scores, automatic(floor=0.01), (), policy, certainty=0.5)
    assert sure.kept_tokens < guessing.kept_tokens
    assert positions(guessing) >= set(range(1600, 1760))


def test_a_guessing_speculator_with_even_scores_sends_the_prompt_dense() -> None:
    scores = random_scores(3200, seed=4)
    selection = select(scores, automatic(), (), BARE, certainty=0.5)
    assert selection.plan == Plan(PlanKind.DENSE, Reason.UNCERTAIN)
    assert select(scores, prune(0.3), (), BARE, certainty=0.5).keep_rate == pytest.approx(0.3)


@given(cases(), st.floats(0.01, 0.5), st.floats(0.5, 1.0))
def test_whatever_the_scores_choose_protection_and_bounds_hold(
    case: tuple[Scores, float, tuple[Span, ...], SelectionPolicy], floor: float, ceiling: float
) -> None:
    scores, _, spans, policy = case
    selection = select(scores, automatic(floor, ceiling), spans, policy)
    kept = positions(selection)
    for span in spans:
        assert kept >= set(range(max(0, span.start), min(len(scores), span.stop)))
    if selection.plan.kind is PlanKind.PRUNE:
        assert floor <= selection.plan.keep <= ceiling
        budget = budget_chunks(len(scores), floor, policy) * policy.chunk_tokens
        assert len(kept) >= budget - (-len(scores) % policy.chunk_tokens)


@pytest.mark.parametrize(
    ("protected", "ends"), [(100, 128), (128, 128), (129, 256), (64, 128), (63, 63), (0, 0)]
)
def test_a_protected_prefix_ends_with_a_whole_block(protected: int, ends: int) -> None:
    policy = replace(BARE, block_tokens=128)
    scores = np.zeros(3200, dtype=np.float32)
    scores[1600:1664] = 1.0
    spans = (Span(0, protected),) if protected else ()
    selection = select(scores, prune(0.02), spans, policy)
    assert selection.runs[0] == (Span(0, ends) if ends else Span(1600, 1664))


def test_the_chunk_after_a_peak_counts_for_a_share_of_it() -> None:
    scores = np.full(320, 0.1, dtype=np.float32)
    scores[96:128] = 1.0  # where a fact begins
    scores[224:256] = 0.2
    carrying = replace(BARE, next_chunk_share=0.3)
    assert select(scores, prune(0.2), (), BARE).runs == (Span(96, 128), Span(224, 256))
    assert select(scores, prune(0.2), (), carrying).runs == (Span(96, 160),)
    # Of a share of a share nothing is left: one chunk, not a tail of them.
    assert select(scores, prune(0.3), (), carrying).runs == (Span(96, 160), Span(224, 256))


def test_a_chunk_is_scored_by_its_unprotected_tokens() -> None:
    scores = np.full(320, 0.1, dtype=np.float32)
    scores[96:112] = 1.0
    scores[224:256] = 0.2
    free = select(scores, prune(0.1), (), BARE)
    held = select(scores, prune(0.2), (Span(96, 112),), BARE)
    assert free.runs == (Span(96, 128),)
    assert held.runs == (Span(96, 112), Span(224, 256), Span(288, 320))
