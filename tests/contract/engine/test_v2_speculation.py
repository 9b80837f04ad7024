"""What the V2 runner's parts do with several rows per request, without the runner."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore")

REQUESTS, LONGEST, VOCABULARY = 3, 32, 50


def states(*requests: tuple[list[int], int]) -> SimpleNamespace:
    """Something like the runner's request states: tokens, and how many are the prompt's."""
    tokens = torch.zeros((REQUESTS, LONGEST), dtype=torch.int32)
    lengths, prompts = (torch.zeros(REQUESTS, dtype=torch.int32) for _ in range(2))
    for slot, (all_tokens, prompt) in enumerate(requests):
        tokens[slot, : len(all_tokens)] = torch.tensor(all_tokens)
        lengths[slot], prompts[slot] = len(all_tokens), prompt
    return SimpleNamespace(
        max_num_reqs=REQUESTS,
        max_model_len=LONGEST,
        device=torch.device("cpu"),
        all_token_ids=SimpleNamespace(gpu=tokens),
        total_len=SimpleNamespace(gpu=lengths),
        prompt_len=SimpleNamespace(gpu=prompts, np=prompts.numpy()),
    )


def history(histories, slot: int) -> list[int]:
    """The tokens of one request, as vLLM's kernel reads them."""
    length = int(histories.total_len.gpu[slot])
    return histories.all_token_ids.gpu[slot, :length].tolist()


def test_output_stands_behind_the_whole_prompt():
    from specprefill.engine.speculation.proposer_v2 import DeviceHistories

    whole = np.arange(10, 20, dtype=np.int32)  # of which three are kept
    known = states(([10, 18, 19, 7, 8], 3), ([30, 31, 32], 3), ([40, 41, 5], 2))
    histories = DeviceHistories(known, torch.device("cpu"))
    histories.enter(0, whole, kept=3, output=())
    histories.enter(1, np.array([30, 31, 32], dtype=np.int32), kept=3, output=())
    histories.enter(2, np.array([39, 40, 41], dtype=np.int32), kept=2, output=[5])
    histories.append(torch.tensor([2, 0]), most=4)
    assert history(histories, 0) == [*whole, 7, 8]
    assert history(histories, 2) == [39, 40, 41, 5]
    histories.append(torch.tensor([1]), most=4)  # still in its prompt: nothing is written
    assert history(histories, 1) == [30, 31, 32]
    known.all_token_ids.gpu[0, 5:7] = torch.tensor([9, 6])
    known.total_len.gpu[0] = 7
    histories.append(torch.tensor([0]), most=4)
    assert history(histories, 0) == [*whole, 7, 8, 9, 6]


def test_a_slot_s_next_request_has_its_own_text():
    from specprefill.engine.speculation.proposer_v2 import DeviceHistories

    known = states(([1, 2, 3], 3))
    histories = DeviceHistories(known, torch.device("cpu"))
    histories.enter(0, np.arange(1, 20, dtype=np.int32), kept=3, output=())
    histories.enter(0, np.array([1, 2, 3], dtype=np.int32), kept=3, output=())
    histories.append(torch.tensor([0]), most=4)
    assert history(histories, 0) == [1, 2, 3]


class Step:
    """A step of a batch whose requests own several rows each."""

    def __init__(self, *rows: tuple[int, int]) -> None:
        """Each of `rows` is a request's slot and the slot of the row's input token."""
        slots = list(dict.fromkeys(slot for slot, _ in rows))
        self.idx_mapping_np = np.array(slots)
        self.expanded_idx_mapping = torch.tensor([slot for slot, _ in rows])
        self.pos = torch.tensor([position for _, position in rows])
        self.seq_lens_upper_bound_np = np.array(
            [1 + max(position for slot, position in rows if slot == one) for one in slots]
        )


def processor(proposed: int, **replays: list[int]):
    """The replay of slots 0, 1, ..., each with a prompt of ten tokens."""
    from vllm import SamplingParams

    from specprefill.engine.params import REPLAY
    from specprefill.engine.sparse.replay_v2 import ReplayTokensV2

    config = SimpleNamespace(num_speculative_tokens=proposed)
    one = ReplayTokensV2(config, states(*[([1] * 10, 10)] * REQUESTS))
    for slot, tokens in enumerate(replays.values()):
        assert one.add_request(slot, SamplingParams(extra_args={REPLAY: tokens})) == bool(tokens)
    return one


def test_each_row_of_a_replay_is_forced_to_its_own_token():
    logits = torch.randn((5, VOCABULARY), generator=torch.Generator().manual_seed(0))
    before = logits.clone()
    # The last prompt token, then two proposals; a free request; a row inside a prompt.
    step = Step((0, 9), (0, 10), (0, 11), (1, 12), (2, 5))
    out = processor(2, first=[7, 8], second=[], third=[9]).apply(logits, step)
    assert out[:2].argmax(dim=1).tolist() == [7, 8]
    assert torch.isfinite(out[:2]).sum(dim=1).tolist() == [1, 1]
    assert out[0, 7] == before[0, 7]
    assert torch.equal(out[2:], before[2:])


def test_a_masked_token_is_forced_all_the_same():
    logits = torch.full((1, VOCABULARY), float("-inf"))
    assert processor(0, first=[7]).apply(logits, Step((0, 9)))[0, 7] == 0.0


def test_a_replay_is_not_over_while_its_steps_are_uncertain():
    """The host counts proposals of steps under way as accepted; the rows count what is."""
    replaying = processor(2, first=[7, 8, 9])
    ahead = Step((0, 9), (0, 10), (0, 11))
    ahead.seq_lens_upper_bound_np = np.array([14])
    out = replaying.apply(torch.zeros((3, VOCABULARY)), ahead)
    assert out.argmax(dim=1).tolist() == [7, 8, 9]
    later = Step((0, 20), (0, 21), (0, 22))
    assert torch.equal(
        replaying.apply(torch.zeros((3, VOCABULARY)), later), torch.zeros((3, VOCABULARY))
    )
    out = replaying.apply(torch.zeros((3, VOCABULARY)), ahead)  # forgotten
    assert torch.equal(out, torch.zeros((3, VOCABULARY)))
