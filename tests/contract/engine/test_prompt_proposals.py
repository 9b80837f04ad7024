"""Proposals are continuations that stand in the whole prompt or in the answer so far."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span

pytestmark = pytest.mark.filterwarnings("ignore")

LONGEST, MOST, LEAST, LONG = 96, 4, 2, 5


def selection(prompt_tokens: int, kept: set[int]) -> Selection:
    """The selection of these positions; the runs between the ends have their slots in reverse."""
    runs: list[Span] = []
    for place in sorted(kept):
        if runs and runs[-1].stop == place:
            runs[-1] = Span(runs[-1].start, place + 1)
        else:
            runs.append(Span(place, place + 1))
    runs = [*runs[:1], *reversed(runs[1:-1]), *runs[1:][-1:]]
    return Selection(prompt_tokens, tuple(runs), Plan(PlanKind.PRUNE, Reason.ASKED, 0.3))


def params(prompt, chosen: Selection, whole: bool = True, **sampling):
    """A request's parameters as the decode service makes them."""
    from vllm import SamplingParams

    from specprefill.engine.params import dropped_args, position_args

    extra = position_args(chosen) | (dropped_args(chosen, prompt) if whole else {})
    return SamplingParams(extra_args=extra, **{"temperature": 0.0, **sampling})


class Runner:
    """Something like a V1 runner: rows of tokens, as many as there are requests."""

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                prompt_lookup_min=LEAST, prompt_lookup_max=LONG, num_speculative_tokens=MOST
            ),
            model_config=SimpleNamespace(max_model_len=LONGEST),
            scheduler_config=SimpleNamespace(max_num_seqs=4),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
        )
        self.requests: dict[str, SimpleNamespace] = {}
        self.tokens: dict[str, list[int]] = {}
        self.input_batch = SimpleNamespace(req_ids=[], req_id_to_index={})

    def add(self, request_id: str, prompt, chosen: Selection, sampling) -> None:
        kept = chosen.engine_prompt(prompt)
        self.requests[request_id] = SimpleNamespace(
            req_id=request_id, sampling_params=sampling, num_prompt_tokens=len(kept)
        )
        self.tokens[request_id] = kept

    def step(self, proposer, sampled: dict[str, list[int]]) -> dict[str, list[int]]:
        """Return what is proposed after these tokens, for a batch in the given order."""
        names = list(sampled)
        self.input_batch.req_ids = names
        self.input_batch.req_id_to_index = {name: row for row, name in enumerate(names)}
        table = np.zeros((4, LONGEST), dtype=np.int32)
        lengths = np.zeros(4, dtype=np.int32)
        for row, name in enumerate(names):
            self.tokens[name] += sampled[name]
            lengths[row] = len(self.tokens[name])
            table[row, : lengths[row]] = self.tokens[name]
        return dict(
            zip(names, proposer.propose(MOST, list(sampled.values()), lengths, table), strict=True)
        )


@pytest.fixture(scope="module")
def make_proposer():
    from specprefill.engine.speculation.proposer_v1 import PromptProposer

    return PromptProposer


@st.composite
def prompts(draw):
    """A prompt, and the positions that are kept: the last one among them."""
    prompt = draw(st.lists(st.integers(0, 3), min_size=2, max_size=40))
    kept = draw(st.sets(st.integers(0, len(prompt) - 1)))
    return tuple(prompt), selection(len(prompt), kept | {len(prompt) - 1})


@given(asked=prompts())
def test_a_request_carries_its_whole_prompt(asked):
    from specprefill.engine.params import whole_prompt

    prompt, chosen = asked
    kept = chosen.engine_prompt(prompt)
    assert whole_prompt(params(prompt, chosen), kept).tolist() == list(prompt)
    assert whole_prompt(params(prompt, chosen, whole=False), kept).tolist() == kept


@settings(deadline=None)
@given(asked=prompts(), steps=st.lists(st.lists(st.integers(0, 3), max_size=3), max_size=6))
def test_a_proposal_continues_the_longest_match_in_the_whole_text(make_proposer, asked, steps):
    prompt, chosen = asked
    runner = Runner()
    proposer = make_proposer(runner)
    runner.add("one", prompt, chosen, params(prompt, chosen))
    text = list(prompt)
    for sampled in steps:
        text += sampled
        proposed = runner.step(proposer, {"one": sampled})["one"]
        longest = longest_match(text) if sampled else 0
        assert bool(proposed) == (longest >= LEAST)
        assert len(proposed) <= min(MOST, LONGEST - len(text))
        if proposed:
            assert occurs(text, text[-longest:] + proposed)


def longest_match(text) -> int:
    """The length, at most LONG, of the longest end of `text` that also stands before."""
    lengths = range(1, min(LONG, len(text) - 1) + 1)
    return max((n for n in lengths if occurs(text[:-1], text[-n:])), default=0)


def occurs(text, part) -> bool:
    """Whether `part` stands in `text`."""
    return any(text[at : at + len(part)] == part for at in range(len(text) - len(part) + 1))


QUOTED = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12)


def test_requests_keep_their_own_text_when_the_batch_changes(make_proposer):
    """Rows move, requests end, are preempted and come back."""
    runner = Runner()
    proposer = make_proposer(runner)
    other = tuple(20 + token for token in QUOTED)
    for name, prompt in (("one", QUOTED), ("two", other)):
        chosen = selection(12, {10, 11})
        runner.add(name, prompt, chosen, params(prompt, chosen))
    assert runner.step(proposer, {"one": [1, 2], "two": [21, 22]}) == {
        "one": [3, 4, 5, 6],
        "two": [23, 24, 25, 26],
    }
    assert runner.step(proposer, {"two": [23, 24]}) == {"two": [25, 26, 27, 28]}
    assert runner.step(proposer, {"two": [25], "one": [3]}) == {
        "two": [26, 27, 28, 29],
        "one": [4, 5, 6, 7],
    }
    for round_ in range(9):  # more requests than rows
        runner.add(f"new-{round_}", QUOTED, chosen, params(QUOTED, chosen))
        assert runner.step(proposer, {f"new-{round_}": [5, 6]}) == {f"new-{round_}": [7, 8, 9, 10]}


def test_each_token_is_read_once():
    """A step costs its own tokens, besides the search."""
    from specprefill.engine.speculation.history import TokenHistories

    histories = TokenHistories(1, LONGEST)
    chosen = selection(12, {10, 11})
    sampling = params(QUOTED, chosen)
    slots = np.array([11, 12, 30], dtype=np.int32)
    row = histories.update("one", sampling, 2, slots)
    assert row is not None
    changed = np.array([-1, -1, -1, 31], dtype=np.int32)
    assert histories.update("one", sampling, 2, changed) == row
    assert histories.tokens[row, : histories.lengths[row]].tolist() == [*QUOTED, 30, 31]


@pytest.mark.parametrize(
    "sampling",
    [
        {"logit_bias": {3: 1.0}},
        {"min_p": 0.1, "temperature": 1.0},
        {"seed": 7, "temperature": 1.0},
    ],
)
def test_requests_that_would_be_sampled_otherwise_get_no_proposals(make_proposer, sampling):
    runner = Runner()
    proposer = make_proposer(runner)
    chosen = selection(12, {10, 11})
    runner.add("one", QUOTED, chosen, params(QUOTED, chosen, **sampling))
    assert runner.step(proposer, {"one": [1, 2]}) == {"one": []}


def test_a_replay_is_over_before_anything_is_proposed(make_proposer):
    from specprefill.engine.params import REPLAY

    runner = Runner()
    proposer = make_proposer(runner)
    chosen = selection(12, {10, 11})
    sampling = params(QUOTED, chosen)
    sampling.extra_args[REPLAY] = [1, 2, 3]
    runner.add("one", QUOTED, chosen, sampling)
    assert runner.step(proposer, {"one": [1, 2]}) == {"one": []}
    assert runner.step(proposer, {"one": [3]}) == {"one": [4, 5, 6, 7]}


def test_no_proposal_exceeds_the_longest_text(make_proposer):
    runner = Runner()
    proposer = make_proposer(runner)
    prompt = QUOTED * 7  # 84 of 96 tokens
    chosen = selection(84, {82, 83})
    runner.add("one", prompt, chosen, params(prompt, chosen))
    assert runner.step(proposer, {"one": [1, 2, 3, 4, 5, 6, 7, 8, 9]}) == {"one": [10, 11, 12]}
    assert runner.step(proposer, {"one": [10, 11, 12]}) == {"one": []}


def test_sampling_parameters_reach_every_proposed_token():
    import torch

    from specprefill.engine.cpu.platform import expand_kernel

    for values, wanted in (
        (torch.tensor([0.5, 0.0, 0.7]), [0.5, 0.5, 0.7]),
        (torch.tensor([9, 8, 7], dtype=torch.int32), [9, 9, 7]),
    ):
        output = torch.empty(3, dtype=values.dtype)
        expand_kernel(output, values, torch.tensor([2, 2, 3]), 0, 1)
        assert output.tolist() == pytest.approx(wanted)
