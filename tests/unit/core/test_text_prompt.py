"""Kept tokens as text: joined with marks, with the template's tokens as they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.text_prompt import GapMark, PlacedTokens, TextPrompt, text_prompt
from specprefill.core.types import Span

# A tokenizer of its own: a token is a word with its leading space, or a marker. Ids are the
# words' places in a vocabulary that grows.
VOCABULARY: list[str] = []
MARK = "\n...\n"


def ids_of(text: str) -> list[int]:
    words = re.findall(r"<[^<>]*>| ?[^ <>\n]+|[ \n<>]", text)
    for word in words:
        if word not in VOCABULARY:
            VOCABULARY.append(word)
    return [VOCABULARY.index(word) for word in words]


def read(tokens: Sequence[int]) -> str:
    return "".join(VOCABULARY[token] for token in tokens)


def placed(tokens: Sequence[int]) -> PlacedTokens:
    edges = np.cumsum([0, *(len(VOCABULARY[token]) for token in tokens)])
    return PlacedTokens(tokens, read(tokens), np.stack((edges[:-1], edges[1:]), axis=1))


def marker_spans(tokens: Sequence[int]) -> list[Span]:
    return [Span(i, i + 1) for i, token in enumerate(tokens) if VOCABULARY[token][0] == "<"]


def write(tokens: Sequence[int], *kept: tuple[int, int], **options: object) -> TextPrompt:
    return text_prompt(
        placed(tokens),
        [Span(*run) for run in kept],
        options.get("fixed", marker_spans(tokens)),  # type: ignore[arg-type]
        GapMark(MARK, tuple(ids_of(MARK))),
        options.get("encode", ids_of),  # type: ignore[arg-type]
    )


def test_runs_are_joined_with_a_mark_at_each_gap() -> None:
    prompt = ids_of("<user>one two three four five six<end>")
    written = write(prompt, (0, 3), (4, 5), (6, 8))
    assert read(written.token_ids) == f"<user>one two{MARK} four{MARK} six<end>"
    assert written.runs == (Span(0, 3), Span(4, 5), Span(6, 8))


def test_what_was_dropped_before_the_first_and_after_the_last_run_has_a_mark_too() -> None:
    assert read(write(ids_of("one two three"), (1, 2)).token_ids) == f"{MARK} two{MARK}"


def test_a_stretch_that_lost_nothing_is_not_tokenised_again() -> None:
    def never(text: str) -> list[int]:
        raise AssertionError(f"tokenised {text!r}")

    prompt = ids_of("<user>one two<end>")
    assert write(prompt, (0, len(prompt)), encode=never).token_ids == tuple(prompt)


def test_only_the_text_between_fixed_tokens_is_tokenised_again() -> None:
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return ids_of(text)

    prompt = ids_of("<system>be brief<user>one two three four<end>")
    write(prompt, (0, 5), (7, 8), (8, 9), encode=encode)
    assert seen == [f"one{MARK} four"]


def test_without_tokens_for_a_text_the_original_ones_are_joined() -> None:
    prompt = ids_of("<user>one two three<end>")
    written = write(prompt, (0, 2), (3, 5), encode=lambda _text: None)
    assert written.token_ids == (*prompt[:2], *ids_of(MARK), *prompt[3:])


def test_a_run_that_begins_within_a_character_is_widened_to_all_of_it() -> None:
    text, offsets = "a東b", np.array([(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)])
    prompt = PlacedTokens([7, 1, 2, 3, 8], text, offsets)
    seen: list[str] = []

    def encode(text: str) -> list[int]:
        seen.append(text)
        return [9]

    written = text_prompt(prompt, [Span(2, 3)], [], GapMark("|", (0,)), encode)
    assert written.runs == (Span(1, 4),)
    assert seen == ["|東|"]


@pytest.mark.parametrize("broken", [chr(0xDCFF), chr(0xFFFD)])
def test_bytes_that_make_no_character_stay_tokens(broken: str) -> None:
    prompt = PlacedTokens([1, 2, 3, 4], f"a{broken}bc", np.array([(0, 1), (1, 2), (2, 3), (3, 4)]))
    kept = [Span(0, 3)]
    written = text_prompt(prompt, kept, [], GapMark("|", (0,)), lambda text: [ord(c) for c in text])
    assert written.token_ids == (1, 2, ord("b"), ord("|"))


PIECES = st.lists(
    st.sampled_from(["<user>", "<end>", "one", " two", " three", "\n", "x"]), min_size=1
)


@st.composite
def prompts_with_runs(draw: st.DrawFn) -> tuple[list[int], list[Span]]:
    tokens = [token for piece in draw(PIECES) for token in ids_of(piece)]
    is_marker = [VOCABULARY[token][0] == "<" for token in tokens]
    drawn = [draw(st.booleans()) or marker for marker in is_marker]  # special tokens survive
    edges = np.flatnonzero(np.diff(np.array(drawn), prepend=False, append=False)).reshape(-1, 2)
    return tokens, [Span(start, stop) for start, stop in edges.tolist()]


@given(prompts_with_runs())
def test_the_text_is_that_of_the_runs_with_marks_between(
    drawn: tuple[list[int], list[Span]],
) -> None:
    tokens, kept = drawn
    written = write(tokens, *((run.start, run.stop) for run in kept))
    expected, end = "", 0
    for run in kept:
        expected += (MARK if run.start > end else "") + read(tokens[run.start : run.stop])
        end = run.stop
    expected += MARK if end < len(tokens) else ""
    assert read(written.token_ids) == expected
    assert written.runs == tuple(kept)


@given(prompts_with_runs())
def test_fixed_tokens_are_all_there_in_order_and_no_others_of_their_kind(
    drawn: tuple[list[int], list[Span]],
) -> None:
    tokens, kept = drawn
    written = write(tokens, *((run.start, run.stop) for run in kept))
    markers = [token for token in tokens if VOCABULARY[token][0] == "<"]
    assert [token for token in written.token_ids if VOCABULARY[token][0] == "<"] == markers
