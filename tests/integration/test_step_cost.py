"""Cost of our own code in a decode step: no term grows with rows times vocabulary."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specprefill.core.positions import PositionMap

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")
ROWS = (8, 32, 128)
VOCABULARY = 4096
PROMPT = 5000
_LOOKUPS = {"aten::index", "aten::index_select", "aten::gather"}  # read as much as they return


class Touched(TorchDispatchMode):
    """Counts the elements that operations read and write; views read and write none."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view:
            lookup = function._schema.name in _LOOKUPS
            values = (args[1:], kwargs, result) if lookup else (args, kwargs, result)
            tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
            self.elements += sum(tensor.numel() for tensor in tensors)
        return result


def replay_params(tokens):
    from vllm import SamplingParams

    from specprefill.engine.params import REPLAY

    return SamplingParams(extra_args={REPLAY: tokens} if tokens else None)


class ReplayingV2:
    """A batch of decoding requests on the V2 runner, each in the slot of its row."""

    def __init__(self, replays):
        from specprefill.engine.sparse.replay_v2 import ReplayTokensV2

        lengths = torch.full((len(replays),), PROMPT, dtype=torch.int32)
        prompt_len = SimpleNamespace(np=lengths.numpy(), gpu=lengths)
        states = SimpleNamespace(device=CPU, vocab_size=VOCABULARY, prompt_len=prompt_len)
        config = SimpleNamespace(num_speculative_tokens=0)
        self._processor = ReplayTokensV2(config, states)
        for slot, replay in enumerate(replays):
            self._processor.add_request(slot, replay_params(replay))
        self._rows = len(replays)
        self._output = 0

    def step(self):
        """Elements that one step touches, and the logits that it leaves."""
        logits = torch.zeros(self._rows, VOCABULARY)
        context = self._context()
        self._output += 1
        with Touched() as touched:
            self._processor.apply(logits, context)
        return touched.elements, logits

    def _context(self):
        from vllm.v1.worker.gpu.sample.logits_processor import LogitsContext

        slots = torch.arange(self._rows)
        visible = torch.full((self._rows,), PROMPT + self._output)
        return LogitsContext(
            expanded_idx_mapping=slots,
            idx_mapping=slots,
            idx_mapping_np=slots.numpy(),
            expanded_local_pos=torch.zeros_like(slots),
            input_ids=torch.zeros_like(slots),
            pos=visible - 1,
            seq_lens_upper_bound_np=visible.numpy(),
        )


class ReplayingV1:
    """The same on the V1 runner."""

    def __init__(self, replays):
        from vllm.v1.sample.logits_processor import BatchUpdate

        from specprefill.engine.sparse.replay import ReplayTokens

        self._processor = ReplayTokens(None, CPU, is_pin_memory=False)
        self._outputs = [[] for _ in replays]
        added = [
            (row, replay_params(replay), None, self._outputs[row])
            for row, replay in enumerate(replays)
        ]
        self._update = BatchUpdate(len(replays), removed=[], added=added, moved=[])

    def step(self):
        """See ReplayingV2."""
        logits = torch.zeros(len(self._outputs), VOCABULARY)
        with Touched() as touched:
            self._processor.update_state(self._update)
            self._processor.apply(logits)
        self._update = None
        for output in self._outputs:
            output.append(0)
        return touched.elements, logits


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("batch", [ReplayingV1, ReplayingV2])
def test_a_replay_that_is_over_costs_nothing(batch, rows):
    replaying = batch([[7]] * rows)  # as after every hand-over
    first, logits = replaying.step()
    assert first > 0
    assert logits.argmax(dim=-1).tolist() == [7] * rows
    for _ in range(3):
        touched, logits = replaying.step()
        assert touched == 0
        assert not logits.any()


@pytest.mark.parametrize("batch", [ReplayingV1, ReplayingV2])
def test_a_replaying_row_touches_that_row_alone(batch):
    touched = [batch([[7, 8], *[[]] * (rows - 1)]).step()[0] for rows in ROWS]
    assert touched[0] == touched[1] == touched[2] <= 4 * VOCABULARY


@pytest.mark.parametrize("batch", [ReplayingV1, ReplayingV2])
def test_replays_of_different_lengths_end_one_by_one(batch):
    replaying = batch([[5], [5, 6], [5, 6, 9], []])
    seen = [replaying.step()[1].argmax(dim=-1).tolist() for _ in range(4)]
    assert seen == [[5, 5, 5, 0], [0, 6, 6, 0], [0, 0, 9, 0], [0, 0, 0, 0]]


def decode_step(rows, prompt):
    """Elements that a V2 step touches to rewrite `rows` sparse requests' one position each."""
    from specprefill.engine.sparse.batch import SparseSlots

    slots = SparseSlots(max_requests=256, device=CPU, last=1 << 20)
    kept = np.arange(0, 2 * prompt, 2, dtype=np.int64)
    for slot in range(rows):
        slots.occupy(slot, PositionMap(kept, 2 * prompt))
    positions = torch.full((rows,), prompt + 3)
    indices = torch.arange(rows)
    starts = torch.arange(rows + 1)
    spans = [(row, row, row + 1, prompt + 3) for row in range(rows)]
    with Touched() as touched:
        slots.rewrite(positions, indices, starts, spans)
    assert positions.tolist() == [2 * prompt + 3] * rows
    return touched.elements


def test_positions_of_a_decode_step_cost_a_few_elements_a_row():
    touched = [decode_step(rows, prompt=100) for rows in ROWS]
    assert all(count <= 16 * rows for count, rows in zip(touched, ROWS, strict=True))


def test_positions_of_a_decode_step_do_not_depend_on_the_prompt():
    assert decode_step(32, prompt=100) == decode_step(32, prompt=10_000)
