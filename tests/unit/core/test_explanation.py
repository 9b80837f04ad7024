"""The reason for every token of a selection."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.explanation import explain
from specprefill.core.protection import KeptBy
from specprefill.core.selection import (
    Scores,
    SelectionPolicy,
    chunk_scores,
    protected_mask,
    select,
)
from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span
from tests.policies import SHIPPED

POLICY = replace(
    SHIPPED, chunk_tokens=10, min_kept_tokens=1, sink_tokens=3, tail_tokens=4, block_tokens=8
)
TOKENS = 100
PROTECTED = {KeptBy.SYSTEM: [Span(2, 6)], KeptBy.TEMPLATE: [Span(5, 6), Span(44, 46)]}


def select_with_scores(
    scores: Scores, keep: float, spans: list[Span], policy: SelectionPolicy
) -> Selection:
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, keep)
    chosen = select(scores, plan, spans, policy)
    return replace(chosen, scores=chunk_scores(scores, spans, policy, 1.0))


def every_span() -> list[Span]:
    return [span for spans in PROTECTED.values() for span in spans]


def test_every_reason_stands_where_it_holds() -> None:
    scores = np.full(TOKENS, 0.1, dtype=np.float32)
    scores[70:80] = 0.9
    selection = select_with_scores(scores, 0.1, every_span(), replace(POLICY, next_chunk_share=0.0))
    found = explain(selection, PROTECTED, POLICY)
    kept = [(each.tokens, each.chunk, each.reasons) for each in found.spans if each.is_kept]
    assert kept == [
        (Span(0, 2), 0, (KeptBy.SINK,)),
        (Span(2, 3), 0, (KeptBy.SYSTEM, KeptBy.SINK)),
        (Span(3, 5), 0, (KeptBy.SYSTEM,)),
        (Span(5, 6), 0, (KeptBy.SYSTEM, KeptBy.TEMPLATE)),
        (Span(6, 8), 0, (KeptBy.BLOCK,)),
        (Span(44, 46), 4, (KeptBy.TEMPLATE,)),
        (Span(70, 80), 7, (KeptBy.SCORED,)),
        (Span(96, 100), 9, (KeptBy.TAIL,)),
    ]
    assert found.threshold == selection.scores.worth[7]


def test_a_dense_plan_keeps_the_rest_because_it_is_dense() -> None:
    selection = Selection(TOKENS, (Span(0, TOKENS),), Plan(PlanKind.DENSE, Reason.ASKED_OFF))
    found = explain(selection, PROTECTED, POLICY)
    assert {reason for each in found.spans for reason in each.reasons} == {
        KeptBy.SYSTEM, KeptBy.TEMPLATE, KeptBy.SINK, KeptBy.TAIL, KeptBy.BLOCK, KeptBy.WHOLE_PROMPT,
    }  # fmt: skip
    assert all(each.is_kept for each in found.spans)
    assert found.threshold is None


def test_a_pruned_prompt_without_scores_was_chosen_without_them() -> None:
    plan = Plan(PlanKind.PRUNE, Reason.SPECULATOR_TIMEOUT, 0.3)
    found = explain(Selection(TOKENS, (Span(50, 60),), plan), {}, POLICY)
    assert [each.reasons for each in found.spans if each.is_kept] == [(KeptBy.STATIC,)]


@given(
    keep=st.floats(0.05, 0.9),
    seed=st.integers(0, 99),
    tokens=st.integers(50, 400),
    edges=st.lists(st.tuples(st.integers(0, 400), st.integers(1, 60)), max_size=4),
)
def test_spans_are_the_selection_and_survive_another_rate(
    keep: float, seed: int, tokens: int, edges: list[tuple[int, int]]
) -> None:
    spans = [Span(min(tokens, a), min(tokens, a + size)) for a, size in edges]
    scores = np.random.default_rng(seed).random(tokens, dtype=np.float32)
    selection = select_with_scores(scores, keep, spans, POLICY)
    found = explain(selection, {KeptBy.SYSTEM: spans}, POLICY).spans
    assert [each.tokens.start for each in found] == [0, *(each.tokens.stop for each in found[:-1])]
    assert found[-1].tokens.stop == tokens
    assert sum(len(each.tokens) for each in found if each.is_kept) == selection.kept_tokens
    for each in found:
        assert each.tokens.start // 10 == (each.tokens.stop - 1) // 10 == each.chunk
    own = {KeptBy.SCORED, KeptBy.WHOLE_PROMPT}
    guarded = [each.tokens for each in found if set(each.reasons) - own]
    mask = np.zeros(tokens, dtype=bool)
    for span in guarded:
        mask[span.start : span.stop] = True
    assert (mask == protected_mask(tokens, spans, POLICY)).all()
    other = select_with_scores(scores, 0.5, spans, POLICY)
    positions = {i for run in other.runs for i in range(run.start, run.stop)}
    for each in found:
        whole = set(range(each.tokens.start, each.tokens.stop))
        assert whole <= positions or not whole & positions


def test_the_scores_of_a_prompt_with_one_that_is_not_finite_are_zero() -> None:
    scores = np.full(TOKENS, 0.1, dtype=np.float32)
    scores[5] = np.nan
    found = chunk_scores(scores, (), POLICY, 0.5)
    assert (found.is_flat, found.certainty, set(found.worth)) == (True, 0.5, {0.0})
