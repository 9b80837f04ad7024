"""The batched rewriting of positions equals the pure mapping, request by request."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specprefill.core.positions import PositionMap

pytestmark = pytest.mark.integration

CPU = torch.device("cpu")


def random_mapping(rng):
    prompt_tokens = rng.randrange(2, 200)
    kept = sorted(rng.sample(range(prompt_tokens), rng.randrange(1, prompt_tokens)))
    return PositionMap(np.array(kept, dtype=np.int64), prompt_tokens)


def random_rows(rng, requests):
    """Per request: its mapping (None: dense), tokens computed before, tokens of this step."""
    rows = []
    for _ in range(requests):
        mapping = random_mapping(rng) if rng.random() < 0.7 else None
        k = mapping.slots if mapping else 100
        computed = rng.choice([0, k // 2, k - 1, k, k + rng.randrange(40)])
        rows.append((mapping, computed, rng.choice([1, 1, 3, 60])))
    return rows


def expected(rows):
    parts = [
        mapping.positions(computed, computed + count)
        if mapping
        else np.arange(computed, computed + count)
        for mapping, computed, count in rows
    ]
    return np.concatenate(parts).tolist()


def in_dimensions(positions, dimensions):
    """Multimodal rope's rows of a text: views of a wider buffer, as vLLM's."""
    if dimensions is None:
        return positions
    buffer = torch.zeros(dimensions, len(positions) + 1, dtype=torch.int64)
    buffer[:, :-1] = positions
    return buffer[:, :-1]


def batch_positions(rows):
    parts = [np.arange(computed, computed + count) for _, computed, count in rows]
    return torch.from_numpy(np.concatenate(parts))


@pytest.mark.parametrize("dimensions", [None, 3])
@pytest.mark.parametrize("seed", range(20))
def test_v1_batches(seed, dimensions):
    from specprefill.engine.params import POSITIONS
    from specprefill.engine.sparse.batch import SparseBatch

    rng = random.Random(seed)
    rows = random_rows(rng, requests=6)
    requests = {}
    for number, (mapping, _, _) in enumerate(rows):
        extra = {POSITIONS: mapping.to_wire()} if mapping else None
        requests[str(number)] = SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))
    padded = torch.cat((batch_positions(rows), torch.zeros(5, dtype=torch.int64)))
    padded = in_dimensions(padded, dimensions)
    scheduled = {str(number): count for number, (_, _, count) in enumerate(rows)}
    SparseBatch(CPU, last=1 << 20).rewrite(padded, requests, scheduled, requests)
    for row in padded if dimensions else [padded]:
        assert row[:-5].tolist() == expected(rows)
        assert row[-5:].tolist() == [0] * 5


@pytest.mark.parametrize("dimensions", [None, 3])
@pytest.mark.parametrize("seed", range(20))
def test_v2_batches(seed, dimensions):
    from specprefill.engine.sparse.batch import SparseSlots

    rng = random.Random(seed)
    state = SparseSlots(max_requests=16, device=CPU, last=1 << 20)
    for slot in range(16):  # occupants of earlier requests must leave no trace
        state.occupy(slot, random_mapping(rng))
    rows = random_rows(rng, requests=6)
    slots = rng.sample(range(16), len(rows))
    for slot, (mapping, _, _) in zip(slots, rows, strict=True):
        state.occupy(slot, mapping)
    starts = np.concatenate(([0], np.cumsum([count for _, _, count in rows])))
    positions = in_dimensions(batch_positions(rows), dimensions)
    state.rewrite(
        positions,
        torch.tensor(slots),
        torch.from_numpy(starts),
        [
            (slot, int(start), int(stop), computed)
            for slot, start, stop, (_, computed, _) in zip(
                slots, starts[:-1], starts[1:], rows, strict=True
            )
        ],
    )
    for row in positions if dimensions else [positions]:
        assert row.tolist() == expected(rows)


def test_v1_requests_that_end_in_a_step_without_tokens_leave_nothing():
    from specprefill.engine.params import POSITIONS
    from specprefill.engine.sparse.batch import SparseBatch

    batch, rng = SparseBatch(CPU, last=1 << 20), random.Random(0)
    for number in range(50):  # each alone: nothing hears of its end
        extra = {POSITIONS: random_mapping(rng).to_wire()}
        alone = {str(number): SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra))}
        batch.rewrite(torch.zeros(1, dtype=torch.int64), alone, {str(number): 1}, alone)
        assert len(batch._known) <= 2
