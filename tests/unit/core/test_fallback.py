"""Pruning without scores."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.fallback import NOMINAL_KEEP, Fallback, OnOverload, static_selection
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Request, Span
from tests.policies import PAPER

POLICY = replace(PAPER, chunk_tokens=32, min_kept_tokens=64, sink_tokens=4, tail_tokens=16)
PLAN = Plan(PlanKind.PRUNE, Reason.SPECULATOR_OVERLOADED, keep=0.2)
VOCABULARY = 5000


def text(tokens: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(VOCABULARY) for _ in range(tokens)]


def asking(prompt, *protected, asked=()):
    return Request("r", tuple(prompt), b"", protected=protected, asked=asked)


def keeps(selection, place: int) -> bool:
    return any(run.start <= place < run.stop for run in selection.runs)


@pytest.mark.parametrize("place", [400, 1700, 3100])
def test_the_chunk_that_shares_the_words_of_the_query_is_kept(place):
    query = [9001, 9002, 9003]
    prompt = text(4000)
    prompt[place : place + 3] = query
    prompt[-8:-5] = query
    selection = static_selection(asking(prompt), PLAN, POLICY)
    assert keeps(selection, place)
    assert selection.keep_rate == pytest.approx(PLAN.keep, abs=0.01)


def test_the_query_may_stand_before_the_tail():
    """Behind the question stands what the chat template adds, and perhaps an instruction."""
    prompt = text(4000)
    prompt[1000:1003] = [9001, 9002, 9003]
    prompt[3900:3903] = [9001, 9002, 9003]
    selection = static_selection(asking(prompt, Span(0, 10), Span(3880, 3950)), PLAN, POLICY)
    assert keeps(selection, 1000)


def test_a_short_question_counts_for_more_than_the_text_before_it():
    prompt = text(4000)
    prompt[1000:1003] = prompt[-8:-5] = [9001, 9002, 9003]  # what is asked
    prompt[2000:2004] = prompt[-62:-58] = [9004, 9005, 9006, 9007]  # text before the question
    policy = replace(POLICY, tail_tokens=64, min_kept_tokens=1)
    plan = replace(PLAN, keep=(4 + 64 + 32) / len(prompt))  # room for one chunk
    assert keeps(static_selection(asking(prompt), plan, policy), 1000)


def test_in_front_of_a_tools_result_the_question_asks():
    prompt = text(4000)
    prompt[20:23] = prompt[1000:1003] = [9001, 9002, 9003]
    prompt[-8:-5] = prompt[3000:3003] = [9004, 9005, 9006]  # the result's own last words
    selection = static_selection(asking(prompt, asked=(Span(18, 24),)), PLAN, POLICY)
    assert keeps(selection, 1000)
    by_its_end = static_selection(asking(prompt), PLAN, POLICY)
    assert keeps(by_its_end, 3000)


def test_without_words_in_common_chunks_are_evenly_spaced():
    selection = static_selection(asking([1] * 4000 + [2] * 16), PLAN, POLICY)
    starts = [run.start for run in selection.runs]
    gaps = [later - earlier for earlier, later in itertools.pairwise(starts)]
    assert len(starts) >= 16
    assert max(gaps) <= 8 * POLICY.chunk_tokens


@given(
    tokens=st.integers(200, 3000), keep=st.floats(0.05, 0.9), words=st.integers(1, 50),
    start=st.integers(0, 150), length=st.integers(1, 50),
)  # fmt: skip
def test_it_obeys_the_rate_and_what_is_protected(tokens, keep, words, start, length):
    prompt = [token % words for token in text(tokens)]
    plan = Plan(PlanKind.PRUNE, Reason.SPECULATOR_TIMEOUT, keep)
    span = Span(start, start + length)
    selection = static_selection(asking(prompt, span), plan, POLICY)
    assert all(keeps(selection, place) for place in (0, span.start, span.stop - 1, tokens - 1))
    if selection.plan.kind is PlanKind.PRUNE:
        least = min(tokens, max(POLICY.min_kept_tokens, keep * tokens))
        assert selection.kept_tokens >= least - POLICY.chunk_tokens
        assert selection.plan.reason is Reason.SPECULATOR_TIMEOUT
    assert selection == static_selection(asking(prompt, span), plan, POLICY)


@pytest.mark.parametrize(
    ("floor", "ceiling", "keep"),
    [(0.05, 1.0, NOMINAL_KEEP), (0.5, 1.0, 0.5), (0.05, 0.1, 0.1)],
)
def test_where_the_scores_would_have_chosen_the_nominal_rate_is_kept(floor, ceiling, keep):
    plan = Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(floor, ceiling))
    request = Request("r", tuple(text(4000)), b"")
    fallback = Fallback(OnOverload.STATIC, POLICY)
    selection = fallback.selection(request, plan, Reason.SPECULATOR_TIMEOUT, 1.0)
    assert selection.keep_rate == pytest.approx(keep, abs=0.02)
    assert selection.plan.reason is Reason.SPECULATOR_TIMEOUT
