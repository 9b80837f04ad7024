"""The forecast of what decode engines have of a conversation's next turn."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specprefill.control.decode_caches import DecodeCaches
from specprefill.core.prefix_digests import BLOCK_TOKENS
from specprefill.core.types import (
    Plan,
    PlanKind,
    PrefilledBy,
    PromptMode,
    Reason,
    Report,
    Request,
    Selection,
    Span,
    dense_selection,
)

PROMPT = tuple(range(2000))
ANSWER = list(range(5000, 5300))
PLAN = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)
KEPT = (Span(0, 300), Span(900, 1200), Span(1900, 2000))
TURN = (*PROMPT, *ANSWER, *range(7000, 7100))


def request(prompt=PROMPT, **fields):
    return Request("r", tuple(prompt), b"", **fields)


def pruned(*runs, tokens=2000, **fields):
    return Selection(tokens, runs, PLAN, **fields)


def next_turn(**fields):
    return pruned(*KEPT[:2], Span(1900, len(TURN)), tokens=len(TURN), **fields)


def report(by=PrefilledBy.PREFILL, cached=0):
    times = dict.fromkeys(("queue_s", "speculate_s", "prefill_s", "transfer_s"), 0.0)
    return Report(
        PlanKind.PRUNE, Reason.DEFAULT, 2000, 700, 0.35, **times, first_decode_s=0.0, ttft_s=0.0,
        prefilled_by=by, cached_tokens=cached,
    )  # fmt: skip


@pytest.fixture
def caches():
    made = DecodeCaches(1000)
    made.learn(request(), pruned(*KEPT), report(), ANSWER)
    return made


def whole_blocks(tokens):
    return tokens // BLOCK_TOKENS * BLOCK_TOKENS


def test_the_next_turn_finds_the_kept_tokens_and_the_answer(caches):
    assert caches.cached_tokens(request(TURN), next_turn()) == whole_blocks(700 + 299)


def test_an_answer_that_comes_back_changed_is_not_there(caches):
    changed = (*PROMPT, 1, *TURN[2001:])
    assert caches.cached_tokens(request(changed), next_turn()) == whole_blocks(700)


@pytest.mark.parametrize(
    "other",
    [
        {"prompt": (5, *TURN[1:])},
        {"prompt": TURN, "cache_salt": "another"},
        {"prompt": TURN, "adapter": "another"},
    ],
    ids=["prompt", "salt", "adapter"],
)
def test_another_conversation_finds_nothing(caches, other):
    assert caches.cached_tokens(request(**other), next_turn()) == 0


def test_a_dense_conversation_is_found_before_it_is_planned():
    caches = DecodeCaches(1000)
    caches.learn(request(), dense_selection(2000, Reason.NO_GAIN), report(), ANSWER)
    turn = request(TURN)
    whole = dense_selection(len(TURN), Reason.NO_GAIN)
    assert caches.cached_tokens(turn, whole) == whole_blocks(2299)


def test_of_other_gateways_conversations_what_is_carried_over_is_known():
    turn = next_turn(carried_tokens=700)
    assert DecodeCaches(1000).cached_tokens(request(TURN), turn) == 700


def test_an_answer_of_one_token_never_reaches_decode():
    caches = DecodeCaches(1000)
    caches.learn(request(), pruned(*KEPT), report(), [7])
    assert caches.cached_tokens(request(TURN), next_turn()) == 0
    caches.learn(request(), pruned(*KEPT), report(PrefilledBy.DECODE), [7])
    assert caches.cached_tokens(request(TURN), next_turn()) == whole_blocks(700)


def test_text_is_another_prompt(caches):
    text = replace(next_turn(), text=tuple(range(900)), plan=replace(PLAN, mode=PromptMode.TEXT))
    caches.learn(request(TURN), text, report(), [])
    assert caches.cached_tokens(request(TURN), text) == 0


def test_misses_are_forgotten_where_nothing_is_tried_any_more(caches):
    turn, hit = (request(TURN), next_turn()), whole_blocks(999)
    for _ in range(30):
        caches.learn(*turn, report(PrefilledBy.DECODE, cached=0), [])
    for _ in range(200):
        caches.learn(*turn, report(PrefilledBy.PREFILL), ANSWER)
    assert caches.cached_tokens(*turn) > hit * 0.9


def test_misses_are_learnt_and_hits_are_believed_again(caches):
    turn, hit = (request(TURN), next_turn()), whole_blocks(999)
    for _ in range(30):
        caches.learn(*turn, report(PrefilledBy.DECODE, cached=0), [])
    assert caches.cached_tokens(*turn) < hit / 10
    for _ in range(30):
        caches.learn(*turn, report(PrefilledBy.DECODE, cached=10_000), [])
    assert caches.cached_tokens(*turn) > hit * 0.9
