"""Prompts go where their prefix is cached, until the queue there costs more than it saves."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.types import Plan, PlanKind, Reason, Request, Selection, Span, dense_selection
from specprefill.gateway.pools.affinity import (
    BLOCK_TOKENS,
    STREAM_TOKENS,
    PrefillLoad,
    PrefixAffinity,
    load_of,
)
from tests.linear_cost import assert_linear

ROOM = 1_000 * BLOCK_TOKENS
PROMPT = tuple(range(10 * BLOCK_TOKENS))


def load(blocks, *, own, name="system"):
    """A prompt of `blocks` shared blocks and `own` tokens of its own."""
    return PrefillLoad(blocks * BLOCK_TOKENS + own, tuple(hash((name, i)) for i in range(blocks)))


def affinity(*names, room=ROOM):
    made = PrefixAffinity(hope=0.0)  # nobody else sends anything
    made.set_replicas(dict.fromkeys(names, room))
    return made


def best(made, prompt):
    return made.rank(prompt)[0]


def request(prompt):
    return Request("r", prompt, b"")


class TestLoad:
    def test_a_dense_prompt_has_a_digest_per_whole_block(self):
        prompt = PROMPT[: 3 * BLOCK_TOKENS + 7]
        found = load_of(request(prompt), dense_selection(len(prompt), Reason.SHORT_PROMPT))
        assert (found.tokens, len(found.prefix)) == (len(prompt), 3)

    def test_only_blocks_before_the_first_gap_count(self):
        runs = (Span(0, 2 * BLOCK_TOKENS + 5), Span(900, 1000))
        selection = Selection(len(PROMPT), runs, Plan(PlanKind.PRUNE, Reason.ASKED, 0.3))
        found = load_of(request(PROMPT), selection)
        assert found.tokens == selection.kept_tokens
        assert (
            found.prefix
            == load_of(request(PROMPT), dense_selection(len(PROMPT), Reason.ASKED_OFF)).prefix[:2]
        )

    def test_a_prompt_that_lost_its_start_shares_nothing(self):
        runs = (Span(200, 800),)
        selection = Selection(len(PROMPT), runs, Plan(PlanKind.PRUNE, Reason.ASKED, 0.3))
        dense = load_of(request(PROMPT), dense_selection(len(PROMPT), Reason.ASKED_OFF))
        assert not set(load_of(request(PROMPT), selection).prefix) & set(dense.prefix)

    def test_the_next_turn_shares_what_it_carries_over(self):
        def prefix(tokens, *runs):
            plan = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)
            selection = Selection(tokens, runs, plan)
            return load_of(request(PROMPT[:tokens]), selection).prefix

        first = prefix(700, Span(0, 150), Span(300, 470), Span(600, 700))
        second = prefix(800, Span(0, 150), Span(300, 470), Span(600, 700), Span(200, 210))
        other = prefix(800, Span(0, 150), Span(310, 480), Span(600, 800))
        assert len(first) == 420 // BLOCK_TOKENS
        assert second[: len(first)] == first
        assert other[1:] != second[1:]
        assert other[0] == second[0]

    def test_a_digest_covers_the_whole_prefix(self):
        changed = (PROMPT[0] + 1, *PROMPT[1:])
        whole = dense_selection(len(PROMPT), Reason.ASKED_OFF)
        assert not set(load_of(request(PROMPT), whole).prefix) & set(
            load_of(request(changed), whole).prefix
        )


def test_a_prefix_draws_its_prompts():
    made = affinity("a", "b")
    made.record_sent("r1", "b", load(4, own=10))
    made.record_end("r1")
    assert best(made, load(4, own=99)) == "b"
    assert best(made, load(2, own=99)) == "b"


def test_other_prompts_go_to_the_replica_that_waits_longest():
    made = affinity("a", "b", "c")
    chosen = []
    for number in range(6):
        prompt = load(2, own=5, name=f"system-{number}")
        chosen.append(best(made, prompt))
        made.record_sent(f"r{number}", chosen[-1], prompt)
        made.record_end(f"r{number}")
    assert chosen == ["a", "b", "c"] * 2


@pytest.mark.parametrize(
    ("queued", "expected"), [(4 * BLOCK_TOKENS - 1, "a"), (4 * BLOCK_TOKENS + 1, "b")]
)
def test_it_spills_when_the_queue_costs_more_than_the_prefix(queued, expected):
    made = affinity("a", "b")
    made.record_sent("r1", "a", load(4, own=0))
    made.record_end("r1")
    made.record_sent("r2", "a", PrefillLoad(queued, ()))
    assert best(made, load(4, own=50)) == expected
    made.record_end("r2")
    assert best(made, load(4, own=50)) == "a"


def test_cached_tokens_do_not_lengthen_the_queue():
    made = affinity("a", "b")
    made.record_sent("r1", "a", load(8, own=0))
    made.record_end("r1")
    for number in range(20):
        made.record_sent(f"s{number}", "a", load(8, own=10))
    assert best(made, load(8, own=10)) == "a"  # 20 x 10 tokens queued, 1024 cached


def test_an_answer_counts_as_long_as_it_runs_whatever_its_prompt_had_cached():
    made = affinity("a", "b")
    turn = replace(load(8, own=0), running_tokens=STREAM_TOKENS)
    made.record_sent("r1", "a", turn)
    made.record_end("r1")
    for number in range(8 * BLOCK_TOKENS // STREAM_TOKENS):
        assert best(made, turn) == "a"
        made.record_sent(f"s{number}", "a", turn)
    assert best(made, turn) == "b"
    made.record_end("s0")
    assert best(made, turn) == "a"


def test_the_least_recent_prefixes_are_forgotten_from_their_end():
    made = affinity("a", "b", room=6 * BLOCK_TOKENS)
    made.record_sent("r1", "a", load(4, own=0, name="old"))
    made.record_sent("r2", "a", load(4, own=0, name="new"))
    made.record_end("r1")
    made.record_end("r2")
    made.record_sent("r3", "b", load(4, own=0, name="old"))  # all of it: 512 tokens
    made.record_end("r3")
    assert best(made, load(4, own=0, name="new")) == "a"
    assert best(made, load(4, own=0, name="old")) == "b"
    assert best(made, load(2, own=0, name="old")) == "a"  # equal, and "a" waits longer


def test_without_a_cache_the_shortest_queue_wins():
    made = affinity("a", "b", room=0)
    made.record_sent("r1", "a", load(4, own=0))
    assert best(made, load(4, own=0)) == "b"
    made.record_end("r1")
    made.record_sent("r2", "b", load(1, own=0))
    assert best(made, load(4, own=0)) == "a"


def test_replicas_come_and_go():
    made = affinity("a", "b")
    made.record_sent("r1", "a", load(4, own=0))
    made.set_replicas({"b": ROOM, "c": ROOM})
    assert set(made.rank(load(4, own=0))) == {"b", "c"}
    made.record_end("r1")  # of a replica that is gone
    made.record_end("r1")
    made.record_sent("r2", "a", load(4, own=0))  # raced with its end
    assert made._running == {}


def test_prompts_that_come_together_spread():
    made = affinity("a", "b")
    assert [made.choose(f"r{i}", load(0, own=100))[0] for i in range(4)].count("a") == 2


def test_a_choice_counts_once_and_no_longer_than_its_request():
    made = affinity("a", "b")
    made.record_sent("elsewhere", "b", load(0, own=50))
    assert made.choose("r", load(0, own=100))[0] == "a"
    assert made.choose("r", load(0, own=100))[0] == "a"  # tried again: not in its own way
    made.record_sent("r", "a", load(0, own=100))
    made.record_end("r")
    assert best(made, load(0, own=1)) == "a"


def test_choices_that_were_never_sent_are_forgotten():
    made = affinity("a", "b")
    made.record_sent("elsewhere", "b", load(0, own=50))
    assert made.choose("given up", load(0, own=1000))[0] == "a"
    for i in range(64):
        made.choose(f"r{i}", load(0, own=0))
    assert best(made, load(0, own=1)) == "a"


def test_a_replica_that_comes_back_knows_nothing():
    made = affinity("a", "b")
    made.record_sent("r1", "a", load(4, own=0))
    made.record_end("r1")
    made.set_replicas({"b": ROOM})
    made.set_replicas({"a": ROOM, "b": ROOM})
    made.record_sent("r2", "b", load(2, own=0))
    made.record_end("r2")
    assert best(made, load(4, own=0)) == "b"
    made.set_replicas({})
    assert made._blocks._holders == {}


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(1, 6)), max_size=30))
def test_the_map_finds_what_each_replicas_memory_holds(calls):
    names = [str(name) for name in range(5)]
    made = affinity(*names, room=7 * BLOCK_TOKENS)
    for number, (place, kind, blocks) in enumerate(calls):
        made.record_sent(str(number), names[place], load(blocks, own=0, name=kind))
    for kind in range(4):
        prefix = load(6, own=0, name=kind).prefix
        found = made._blocks.matches(prefix)
        for replica in made._replicas.values():
            assert found.get(replica.place, 0) == replica.seen.longest_match(prefix)


def _choosing(replicas, blocks):
    """A step that chooses for a prefix that every replica remembers to a depth of its own."""
    made = affinity(*map(str, range(replicas)), room=2 * blocks * BLOCK_TOKENS)
    for place in range(replicas):
        made.record_sent(str(place), str(place), load(blocks * (place + 1) // replicas, own=0))
    prompt = load(blocks, own=5)
    return lambda: [made.choose("r", prompt) for _ in range(20)]


def test_choosing_costs_one_walk_of_the_prompt_whatever_its_length():
    assert_linear(lambda blocks: _choosing(replicas=8, blocks=blocks), 1000)


def test_choosing_costs_one_step_per_replica():
    assert_linear(lambda replicas: _choosing(replicas=replicas, blocks=200), 200)
