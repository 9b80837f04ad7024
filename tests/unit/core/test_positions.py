"""The slot-to-position mapping."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.positions import PositionMap
from specprefill.core.types import Span


@st.composite
def mappings(draw):
    prompt_tokens = draw(st.integers(1, 400))
    kept = sorted(draw(st.sets(st.integers(0, prompt_tokens - 1), min_size=1)))
    behind = draw(st.integers(0, len(kept)))  # some of them in later slots
    return PositionMap(np.array(kept[behind:] + kept[:behind], dtype=np.int64), prompt_tokens)


def test_output_tokens_continue_at_the_original_length():
    # The example of the paper's section 3.2.4.
    mapping = PositionMap(np.array([0, 1, 3, 6, 7]), prompt_tokens=10)
    assert mapping.positions(0, 8).tolist() == [0, 1, 3, 6, 7, 10, 11, 12]


@given(mappings(), st.integers(0, 500), st.integers(0, 50))
def test_any_window_equals_the_definition(mapping, start, length):
    k, n = mapping.slots, mapping.prompt_tokens
    want = [
        int(mapping.kept[slot]) if slot < k else n + slot - k
        for slot in range(start, start + length)
    ]
    assert mapping.positions(start, start + length).tolist() == want


@given(mappings())
def test_the_wire_form_is_lossless(mapping):
    again = PositionMap.from_wire(mapping.to_wire())
    assert again.kept.tolist() == mapping.kept.tolist()
    assert again.prompt_tokens == mapping.prompt_tokens


@given(mappings())
def test_slots_before_the_first_gap_are_their_own_positions(mapping):
    dense = mapping.dense_slots
    assert mapping.positions(0, dense).tolist() == list(range(dense))
    if dense < mapping.slots:
        assert mapping.kept[dense] != dense


def test_a_whole_prompt_is_the_identity():
    mapping = PositionMap.from_runs([Span(0, 7)], 7)
    assert mapping.is_identity
    assert mapping.positions(5, 9).tolist() == [5, 6, 7, 8]


def test_a_dropped_tail_is_no_identity():
    mapping = PositionMap.from_runs([Span(0, 5)], 7)
    assert not mapping.is_identity
    assert mapping.positions(4, 6).tolist() == [4, 7]


@pytest.mark.parametrize(
    ("kept", "prompt_tokens"),
    [([], 4), ([0, 0], 4), ([2, 1, 2], 4), ([-1, 2], 4), ([0, 4], 4)],
)
def test_malformed_positions_are_refused(kept, prompt_tokens):
    with pytest.raises(ValueError, match="positions"):
        PositionMap(np.array(kept, dtype=np.int64), prompt_tokens)


@pytest.mark.parametrize(
    "wire",
    [
        {},
        {"runs": [0, 4]},
        {"runs": [0, 1, 2], "prompt_tokens": 4},
        {"runs": "0", "prompt_tokens": 4},
        {"runs": [0, "1"], "prompt_tokens": 4},
    ],
)
def test_a_malformed_wire_form_is_refused(wire):
    with pytest.raises(ValueError, match="positions"):
        PositionMap.from_wire(wire)
