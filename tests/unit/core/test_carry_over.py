"""Append-only selection over the turns of a conversation."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.carry_over import UNBOUNDED, KeptBefore, continue_selection
from specprefill.core.selection import select
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Span
from tests.policies import SHIPPED

DEFAULT = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)
POLICY = replace(
    SHIPPED,
    chunk_tokens=8,
    min_kept_tokens=8,
    tail_tokens=8,
    block_tokens=8,
    next_chunk_share=0.0,
    whole_turn_tokens=40,
)


def scores_of(tokens: int, *peaks: int) -> np.ndarray:
    """Low noise, and a high score for these chunks."""
    scores = np.random.default_rng(tokens).uniform(0.01, 0.02, tokens).astype(np.float32)
    for chunk in peaks:
        scores[8 * chunk : 8 * (chunk + 1)] = 1.0
    return scores


def first_turn(tokens: int, *peaks: int, plan: Plan = DEFAULT) -> KeptBefore:
    runs = select(scores_of(tokens, *peaks), plan, (), POLICY).runs
    return KeptBefore(tokens, runs, plan.keep if plan.reason is Reason.ASKED else None)


def second_turn(
    before, tokens, *peaks, plan=DEFAULT, protected=(), policy=POLICY, bounds=UNBOUNDED
):
    scores = scores_of(tokens, *peaks)
    return continue_selection(scores, plan, protected, policy, 1.0, before, bounds=bounds)


def keeps(selection, *chunks) -> bool:
    kept = {place for run in selection.runs for place in range(run.start, run.stop)}
    return all(set(range(8 * chunk, 8 * (chunk + 1))) <= kept for chunk in chunks)


def overlaps(selection, chunk) -> bool:
    return any(run.start < 8 * chunk + 8 and 8 * chunk < run.stop for run in selection.runs)


def test_a_short_turn_is_kept_whole_behind_what_was_kept():
    before = first_turn(400, 7, 20)
    after = second_turn(before, 430, 7, 20)
    assert after.plan.reason is Reason.CARRIED_OVER
    assert after.runs[: len(before.runs) - 1] == before.runs[:-1]
    assert after.runs[-1] == Span(before.runs[-1].start, 430)
    assert after.carried_tokens == before.kept_tokens


def test_dropped_text_that_the_new_question_needs_follows_at_its_positions():
    before = first_turn(400, 7, 20)
    needed = next(chunk for chunk in range(30, 50) if not overlaps(before, chunk))
    after = second_turn(before, 430, needed)
    assert after.plan.reason is Reason.EXTENDED
    assert after.runs[: len(before.runs)] == before.runs
    assert after.runs[len(before.runs)] == Span(8 * needed, 8 * needed + 8)
    assert after.runs[-1] == Span(400, 430)


def test_a_protected_text_that_was_dropped_is_fetched_too():
    before = first_turn(400, 7, 20)
    after = second_turn(before, 430, 7, 20, protected=(Span(200, 203),))
    assert (after.plan.reason, Span(200, 203) in after.runs) == (Reason.EXTENDED, True)


def test_a_long_turn_is_chosen_from():
    before = first_turn(400, 7, 20)
    after = second_turn(before, 600, 7, 60)
    assert after.plan.reason is Reason.CARRIED_OVER
    new = [run for run in after.runs if run.stop > 400]
    assert sum(map(len, new)) < 150
    assert keeps(after, 60)


def test_a_question_about_quite_another_part_selects_anew():
    before = first_turn(400, 7, 20)
    moved = tuple(range(22, 36))
    after = second_turn(before, 430, *moved)
    assert after.plan.reason is Reason.RESELECTED
    assert after.runs == select(scores_of(430, *moved), DEFAULT, (), POLICY).runs
    assert after.carried_tokens == 0


@pytest.mark.parametrize(
    ("first", "second", "reason"),
    [
        (0.3, 0.3, Reason.CARRIED_OVER),
        (0.3, 0.5, Reason.RESELECTED),
        (0.3, 0.2, Reason.RESELECTED),
    ],
)
def test_a_rate_that_the_caller_asks_for_is_kept(first, second, reason):
    first_plan, second_plan = (Plan(PlanKind.PRUNE, Reason.ASKED, keep) for keep in (first, second))
    before = first_turn(400, 7, 20, plan=first_plan)
    assert second_turn(before, 430, 7, 20, plan=second_plan).plan.reason is reason


@pytest.mark.parametrize("keep", [None, 0.6])
def test_a_floor_above_what_was_kept_selects_anew(keep):
    within = KeepRange(0.6, 0.9)
    plan = replace(DEFAULT, keep=keep) if keep else Plan(PlanKind.PRUNE, Reason.AUTO, within=within)
    before = first_turn(400, 7, 20)
    after = second_turn(before, 430, 7, 20, plan=plan, bounds=within)
    assert after.plan.reason is Reason.RESELECTED
    assert after.keep_rate >= 0.6


def test_a_ceiling_below_what_was_kept_selects_anew():
    before = first_turn(400, 7, 20)
    plan = replace(DEFAULT, keep=0.15)
    after = second_turn(before, 430, 7, 20, plan=plan, bounds=KeepRange(0.0, 0.15))
    assert after.plan.reason is Reason.RESELECTED
    assert after.keep_rate < 0.2 < before.kept_tokens / 400


def test_bounds_that_what_was_kept_meets_change_nothing():
    before = first_turn(400, 7, 20)
    after = second_turn(before, 430, 7, 20, bounds=KeepRange(0.25, 0.5))
    assert after.plan.reason is Reason.CARRIED_OVER


def test_scores_that_show_nothing_send_the_turn_dense():
    before = first_turn(400, 7, 20)
    flat = np.ones(430, dtype=np.float32)
    after = continue_selection(flat, DEFAULT, (), POLICY, 1.0, before)
    assert (after.plan.kind, after.plan.reason) == (PlanKind.DENSE, Reason.FLAT_SCORES)


@given(
    st.integers(120, 400),
    st.integers(1, 200),
    st.lists(st.integers(0, 70), max_size=5),
    st.lists(st.integers(0, 70), max_size=5),
)
def test_every_turn_keeps_distinct_tokens_of_the_prompt_and_its_protected_ones(
    tokens, new, peaks, moved
):
    before = first_turn(tokens, *peaks)
    after = second_turn(before, tokens + new, *moved)
    places = [place for run in after.runs for place in range(run.start, run.stop)]
    assert len(set(places)) == len(places) == after.kept_tokens
    assert max(places) == tokens + new - 1  # the tail
    assert min(places) == 0  # the sink
    if after.carried_tokens:
        kept = [place for run in before.runs for place in range(run.start, run.stop)]
        assert places[: len(kept)] == kept
