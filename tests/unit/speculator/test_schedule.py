"""Which prompts the next pass reads, and who looks ahead."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.control.reading_order import AGEING
from specprefill.core.types import Request
from specprefill.speculator.jobs import Job, Pace
from specprefill.speculator.schedule import Limits, next_look_ahead, next_reading
from specprefill.speculator.translation import SamePrompt
from tests.unit.speculator.gated_scorer import PLAN, POLICY

CHUNK = 100
ROOMY = Limits(CHUNK, prompts=8, bytes=1 << 30)


class Opened:
    """The used part of a reading."""

    def __init__(self, tokens: int) -> None:
        self.unread_tokens = tokens - 1


@pytest.fixture(scope="module")
def loop():
    made = asyncio.new_event_loop()
    yield made
    made.close()


@pytest.fixture(scope="module")
def queued(loop):
    """Make a request of some tokens that waits."""

    def make(tokens, queued_at=0, remembered=0):
        asked = Request("r", (1,), b"")
        answer = loop.create_future()
        prompt = SamePrompt((1,) * tokens)
        return Job(asked, PLAN, POLICY, 0.0, answer, prompt, queued_at, remembered)

    return make


def begin(job):
    job.reading = Opened(len(job.read_as.prompt) - job.remembered_tokens)
    return job


def tokens_of(job):
    return len(job.read_as.prompt)


def chosen(begun, queue, limits=ROOMY):
    return next_reading(begun, queue, limits, tokens_of)


def test_short_prompts_share_a_pass_shortest_first(queued):
    long, short, shorter = queued(60), queued(40), queued(20)
    assert chosen([], [long, short, shorter]) == [shorter, short, long]
    assert chosen([], [queued(300), short, shorter])[:2] == [shorter, short]


def test_a_short_prompt_goes_before_the_rest_of_a_long_one(queued):
    long, short = begin(queued(8000)), queued(120)
    assert chosen([long], [short]) == [short]


def test_what_is_remembered_need_not_be_read(queued):
    turn, short = queued(8000, remembered=7950), queued(120)
    assert chosen([], [short, turn])[0] is turn


def test_a_long_prompt_waits_for_others_twice_its_own_tokens_at_most(queued):
    long = queued(1000)
    read = int(1000 / AGEING)
    assert chosen([], [long, queued(50, queued_at=read - 200)])[0] is not long
    assert chosen([], [long, queued(50, queued_at=read)])[0] is long


def test_its_own_tokens_do_not_make_a_prompt_older(queued):
    long = begin(queued(8000))
    long.read_tokens = 4000
    long.reading.unread_tokens = 4000
    assert chosen([long], [queued(1000, queued_at=4000)])[0] is not long


@pytest.mark.parametrize("limits", [Limits(CHUNK, 2, 1 << 30), Limits(CHUNK, 8, 700)])
def test_one_that_does_not_fit_keeps_its_turn(queued, limits):
    begun, next_one, later = begin(queued(500)), queued(150), queued(300)
    other = begin(queued(100)) if limits.prompts == 2 else begin(queued(60))
    other.reading.unread_tokens = 0
    found = chosen([begun, other], [later, next_one], limits=limits)
    assert found == [begun]


def test_read_prompts_look_ahead_together_while_that_shortens_the_mean_wait(queued):
    pace = Pace(token_s=1e-4, look_ahead_s=0.2)
    ready = [begin(queued(1)) for _ in range(4)]
    assert next_look_ahead(ready, [begin(queued(501))], pace) == []
    assert next_look_ahead(ready, [begin(queued(502))], pace) == ready
    assert next_look_ahead(ready, [], pace) == ready
    assert next_look_ahead(ready, [queued(100_000)], Pace()) == []  # nothing measured yet
    assert next_look_ahead([begin(queued(90))], [], pace) == []


@settings(max_examples=60)
@given(st.lists(st.integers(1, 900), min_size=1, max_size=12), st.integers(1, 4))
def test_every_prompt_is_read_to_its_end(queued, lengths, places):
    limits = Limits(CHUNK, places, 1000)
    queue, begun, order = [queued(tokens) for tokens in lengths], [], []
    for _ in range(2 * sum(lengths) + 1):
        if not queue and not begun:
            break
        ready = next_look_ahead(begun, jobs := chosen(begun, queue, limits), Pace(1.0, 0.0))
        order += ready
        begun = [job for job in begun if job not in ready]
        room = 0 if ready else CHUNK
        for job in () if ready else jobs:
            if job.reading is None:
                queue.remove(job)
                begun.append(begin(job))
            tokens = min(room, job.unread_tokens)
            job.reading.unread_tokens -= tokens
            job.read_tokens += tokens
            room -= tokens
        assert len(begun) <= places
        assert sum(map(tokens_of, begun)) <= 1000
    assert len(order) == len(lengths)
