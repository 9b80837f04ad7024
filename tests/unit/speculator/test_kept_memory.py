"""What earlier prompts kept, found by those that extend them."""

import random

import pytest

from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span, dense_selection
from specprefill.speculator.kept_memory import BLOCK_TOKENS, MOST_OPENING_TOKENS, KeptMemory

RNG = random.Random(1)
PROMPT = [RNG.randrange(30000) for _ in range(5 * BLOCK_TOKENS + 40)]
RUNS = (Span(0, 64), Span(200, 230), Span(len(PROMPT) - 100, len(PROMPT)))


def pruned(prompt, runs=RUNS, reason=Reason.DEFAULT) -> Selection:
    return Selection(len(prompt), runs, Plan(PlanKind.PRUNE, reason, 0.3))


def remembering(prompt=PROMPT, selection=None, room=1 << 20, opening=0) -> KeptMemory:
    memory = KeptMemory(room)
    kept = selection or pruned(prompt)
    memory.remember(prompt, kept, Reason.DEFAULT, opening_tokens=opening)
    return memory


def test_a_longer_prompt_finds_what_its_beginning_kept():
    before = remembering().find([*PROMPT, 1, 2, 3])
    assert (before.tokens, before.runs) == (len(PROMPT), RUNS)


def test_the_same_prompt_is_not_its_own_next_turn():
    assert remembering().find(PROMPT) is None


def test_the_next_turn_may_lack_what_opened_the_answer():
    before = remembering(opening=10).find([*PROMPT[:-10], *range(50)])
    assert before.tokens == len(PROMPT) - 10
    assert before.runs[-1] == Span(len(PROMPT) - 100, len(PROMPT) - 10)


@pytest.mark.parametrize("question_tokens", [1, 15, 200])
def test_another_question_about_the_same_text_is_not_a_next_turn(question_tokens):
    opening = [40_001, 40_002, 40_003]
    one, other = ([*PROMPT, *range(first, first + question_tokens), *opening] for first in (0, 500))
    memory = remembering(one, opening=len(opening))
    assert memory.find([*other, *range(90)]) is None
    assert memory.find([*one, *range(90)]).tokens == len(one)


def test_of_a_long_opening_not_all_is_forgiven():
    memory = remembering(opening=200)
    assert memory.find([*PROMPT[:-MOST_OPENING_TOKENS], *range(30001, 30201)]) is not None
    assert memory.find([*PROMPT[: -MOST_OPENING_TOKENS - 1], *range(30001, 30201)]) is None


def test_of_more_conversations_about_one_text_than_fit_the_newest_are_remembered():
    prompts = [[*PROMPT, *range(500 * n, 500 * n + 20)] for n in range(5)]
    entry_bytes = 8 * (BLOCK_TOKENS + 40 + 20) + 64 * len(RUNS) + 256
    memory = KeptMemory(3 * entry_bytes)
    for prompt in prompts:
        memory.remember(prompt, pruned(prompt), Reason.DEFAULT)
    found = [memory.find([*prompt, 7]) is not None for prompt in prompts]
    assert found == [False, False, True, True, True]


def test_many_conversations_about_one_text_are_all_remembered():
    memory = KeptMemory(1 << 20)
    prompts = [[*PROMPT, *range(500 * n, 500 * n + 20)] for n in range(20)]
    for prompt in prompts:
        memory.remember(prompt, pruned(prompt), Reason.DEFAULT)
    assert [memory.find([*prompt, 1]).tokens for prompt in prompts] == [len(PROMPT) + 20] * 20


def test_the_longest_turn_is_found():
    memory, longer = remembering(), [*PROMPT, *range(300)]
    runs = (*RUNS[:-1], Span(RUNS[-1].start, len(longer)))
    memory.remember(longer, pruned(longer, runs), Reason.CARRIED_OVER)
    assert memory.find([*longer, 5]).tokens == len(longer)
    assert memory.find([*PROMPT, 5]).tokens == len(PROMPT)


def test_branches_of_one_conversation_are_told_apart():
    memory, branches = KeptMemory(1 << 20), []
    for branch in range(3):
        prompt = [*PROMPT, branch]
        branches.append((prompt, (Span(0, 64 + branch), Span(len(PROMPT), len(prompt)))))
        memory.remember(prompt, pruned(*branches[-1]), Reason.DEFAULT)
    for prompt, runs in branches:
        assert memory.find([*prompt, 9]).runs == runs


def test_prompts_of_other_salts_are_not_earlier_turns():
    memory = KeptMemory(1 << 20)
    memory.remember(PROMPT, pruned(PROMPT), Reason.DEFAULT, "mine")
    assert memory.find([*PROMPT, 1], "mine").tokens == len(PROMPT)
    assert memory.find([*PROMPT, 1]) is None
    assert memory.find([*PROMPT, 1], "yours") is None


def test_dense_and_short_prompts_are_not_remembered():
    short = PROMPT[: 2 * BLOCK_TOKENS - 1]
    assert remembering(short, pruned(short, (Span(0, 64),))).find([*short, 1]) is None
    dense = dense_selection(len(PROMPT), Reason.NO_GAIN)
    assert remembering(selection=dense).find([*PROMPT, 1]) is None


def test_a_rate_is_remembered_only_where_it_was_asked_for():
    memory = KeptMemory(1 << 20)
    memory.remember(PROMPT, pruned(PROMPT), Reason.ASKED)
    assert memory.find([*PROMPT, 1]).keep == 0.3
    assert remembering().find([*PROMPT, 1]).keep is None


def test_the_oldest_is_forgotten_beyond_the_budget():
    memory = KeptMemory(6000)
    prompts = [[each, *PROMPT] for each in range(8)]
    for prompt in prompts:
        memory.remember(prompt, pruned(prompt), Reason.DEFAULT)
    found = [memory.find([*prompt, 1]) is not None for prompt in prompts]
    assert found == sorted(found)
    assert 0 < sum(found) < len(prompts)
