"""Chunks end where the text has a border."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.chunks import Chunks, TextBorders

WORDS = (
    " word",
    "word",
    ".",
    ".\n",
    "\n\n",
    ",",
    ' said"',
    '."',
    "{",
    '",\n "',
    "3",
    ". ",
    "\u3002",
)
BORDERS = TextBorders.of(WORDS)
PLAIN = WORDS.index("word")


def ids(*texts: str) -> list[int]:
    return [WORDS.index(text) for text in texts]


def starts(prompt, size):
    return BORDERS.chunks(prompt, size).starts.tolist()


def test_chunks_of_equal_length_are_the_papers():
    chunks = Chunks.of_equal_length(70, 32)
    assert chunks.starts.tolist() == [0, 32, 64]
    assert chunks.sizes.tolist() == [32, 32, 6]
    assert chunks.spread(np.array([1, 2, 3])).tolist() == [1] * 32 + [2] * 32 + [3] * 6
    assert chunks.sums(np.ones(70)).tolist() == [32.0, 32.0, 6.0]


def test_without_borders_chunks_have_the_length_that_is_aimed_at():
    assert starts([PLAIN] * 40, 8) == [0, 8, 16, 24, 32]


@pytest.mark.parametrize(
    ("end", "following", "is_border"),
    [
        (".", " word", True),
        (".", "3", False),  # of a number
        (".", "word", False),  # of a name
        (". ", "word", True),
        ('."', " word", True),
        (",", " word", True),
        (",", "3", False),
        ('",\n "', "3", True),
        ("\n\n", "word", True),
        ("\u3002", "word", True),  # no blank follows it
        ("word", " word", False),
    ],
)
def test_a_border_is_where_a_reader_sees_one(end, following, is_border):
    prompt = [*[PLAIN] * 5, *ids(end, following), *[PLAIN] * 20]
    assert (starts(prompt, 8)[1] == 6) is is_border


def test_lines_come_before_sentences_and_these_before_clauses():
    prompt = [PLAIN] * 40
    prompt[7:9] = ids(",", " word")
    assert starts(prompt, 8)[1] == 8
    prompt[10:12] = ids(".", " word")
    assert starts(prompt, 8)[1] == 11
    prompt[4] = WORDS.index("\n\n")
    assert starts(prompt, 8)[1] == 5


def test_of_equal_borders_the_nearest_is_taken():
    prompt = [PLAIN] * 40
    for place in (4, 9, 13):
        prompt[place] = WORDS.index("\n\n")
    assert starts(prompt, 8)[1] == 10


def test_a_token_beyond_the_vocabulary_is_no_border():
    assert starts([len(WORDS) + 7] * 20, 8) == [0, 8]


@given(
    st.lists(st.integers(0, len(WORDS) - 1), min_size=1, max_size=300),
    st.lists(st.integers(0, len(WORDS) - 1), max_size=60),
    st.sampled_from([1, 2, 7, 16]),
)
def test_chunks_cover_the_prompt_within_their_bounds_and_keep_their_place(prompt, more, size):
    chunks = BORDERS.chunks(prompt, size)
    sizes = chunks.sizes
    assert sizes.sum() == len(prompt)
    assert (sizes > 0).all()
    assert (sizes[:-1] >= max(1, round(0.5 * size))).all()
    assert (sizes <= max(1, round(1.75 * size))).all()
    longer = BORDERS.chunks([*prompt, *more], size).starts.tolist()
    # What lies a chunk's reach behind is settled: a conversation's next turn cuts it alike.
    settled = [start for start in chunks.starts.tolist() if start + 2 * size < len(prompt)]
    assert longer[: len(settled)] == settled
