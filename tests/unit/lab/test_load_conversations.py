"""A load of conversations: a turn extends the one before with its answer."""

import contextlib
import itertools

import numpy as np

from specprefill.lab.loadtest import runner
from specprefill.lab.loadtest.outcome import RequestEnding
from specprefill.lab.loadtest.prompt_source import Source
from specprefill.lab.loadtest.recorder import RequestRefused
from specprefill.lab.loadtest.runner import RunProgress
from specprefill.lab.loadtest.scenario import ConversationTurns, Prompts

TURNS = ConversationTurns(turns=4, growth_tokens=120, think_s=0.0)
FIRST = 600


class Memory:
    """A service that answers with every value it has read, or refuses from a turn on."""

    def __init__(self, refuses_from=99):
        self.asked = []
        self._refuses_from = refuses_from

    @contextlib.asynccontextmanager
    async def open(self):
        yield

    async def stream(self, prompt, timeout_s, recorder):
        self.asked.append(prompt)
        turn = sum(each["role"] == "user" for each in prompt.messages)
        if turn >= self._refuses_from:
            raise RequestRefused(RequestEnding.SHED, "429")
        recorder.text(" ".join(each["content"] for each in prompt.messages))


async def converse(caller, tokenizer, conversations=2, seed=1):
    source = Source(tokenizer, seed)
    prompts = source.draw([Prompts(prompt_tokens=FIRST)], conversations, np.random.default_rng(0))
    turns = source.conversations(TURNS, conversations)
    planned = [
        runner.PlannedRequest(index, 0.0, prompt, turns=more)
        for index, (prompt, more) in enumerate(zip(prompts, turns, strict=True))
    ]
    progress = RunProgress()
    return await runner.run(planned, caller, 5.0, progress), progress


async def test_a_turn_holds_the_answer_and_asks_something_new(demo_tokenizer):
    caller = Memory()
    outcomes, progress = await converse(caller, demo_tokenizer)
    assert [each.index for each in outcomes] == list(range(8))
    assert [each.variant for each in outcomes[::2]] == [
        "default", "default, turn 2", "default, turn 3", "default, turn 4",
    ]  # fmt: skip
    assert all(each.score == 1.0 for each in outcomes)
    assert (progress.total, progress.sent, progress.answered) == (8, 8, 8)
    first = [each for each in caller.asked if each.messages[:2] == caller.asked[0].messages[:2]]
    for turn, later in itertools.pairwise(first):
        assert later.messages[: len(turn.messages)] == turn.messages
        answer, new = later.messages[len(turn.messages) :]
        assert (answer["role"], new["role"]) == ("assistant", "user")
        tokens = len(demo_tokenizer.encode(new["content"]))
        assert TURNS.growth_tokens < tokens < TURNS.growth_tokens + 60
    assert first[1].messages[-2]["content"] == outcomes[0].stream.text
    assert len({each.messages[-1]["content"] for each in caller.asked}) == 8


async def test_an_answer_that_forgets_scores_nothing(demo_tokenizer):
    """Turn 3 asks about the fact of turn 2."""
    outcomes, _ = await converse(Memory(), demo_tokenizer, conversations=1)
    asked = await last_prompt(demo_tokenizer, 3)
    assert asked.score(outcomes[1].stream.text) == 1.0
    assert asked.score(asked.messages[-1]["content"]) == 0.0


async def last_prompt(tokenizer, turn):
    caller = Memory()
    await converse(caller, tokenizer, conversations=1)
    return caller.asked[turn - 1]


async def test_a_conversation_ends_at_a_refusal(demo_tokenizer):
    outcomes, progress = await converse(Memory(refuses_from=3), demo_tokenizer)
    endings = [each.stream.ending for each in outcomes]
    assert endings == [RequestEnding.ANSWERED] * 4 + [RequestEnding.SHED] * 2
    assert (progress.total, progress.sent, progress.in_flight) == (6, 6, 0)


async def test_a_seed_is_one_conversation(demo_tokenizer):
    first, second, other = Memory(), Memory(), Memory()
    for caller, seed in ((first, 1), (second, 1), (other, 2)):
        await converse(caller, demo_tokenizer, conversations=1, seed=seed)
    assert first.asked[-1].messages == second.asked[-1].messages
    assert first.asked[-1].messages != other.asked[-1].messages
