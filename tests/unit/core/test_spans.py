"""The spans of a prompt that are protected from pruning."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.core.occurrences import Cancelled, find_occurrences
from specprefill.core.protection import (
    Offsets,
    altered_piece,
    merge_spans,
    protected_spans,
    special_spans,
)
from specprefill.core.types import Span
from tests.linear_cost import assert_linear

DOCUMENT = "alpha bravo charlie delta echo foxtrot golf hotel india juliet"


def words(text: str) -> Offsets:
    """Markers are tokens, and so are words with their leading space, as in a byte-level BPE."""
    return pairs(match.span() for match in re.finditer(r"<[^<>]*>| ?[^ <]+|.", text, re.DOTALL))


def pairs(spans: Iterable[tuple[int, int]]) -> Offsets:
    return np.array(list(spans), dtype=np.int64).reshape(-1, 2)


def characters(text: str) -> Offsets:
    return pairs((i, i + 1) for i in range(len(text)))


def rendered(*turns: tuple[str, str]) -> str:
    return "".join(f"<{role}>{content}</>" for role, content in turns) + "<assistant>"


def protected_text(text: str, spans: tuple[Span, ...]) -> str:
    offsets = words(text)
    return "|".join(text[offsets[s.start][0] : offsets[s.stop - 1][1]].strip() for s in spans)


def spans_of(
    text: str,
    messages: list[dict[str, object]] | None,
    protect: tuple[str, ...] = (),
    tail_tokens: int = 1,
) -> str:
    spans = protected_spans(text, words(text), messages, protect, tail_tokens)
    return protected_text(text, spans)


def test_template_system_message_and_query_tail_are_protected() -> None:
    text = rendered(("system", "be brief"), ("user", DOCUMENT))
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": DOCUMENT},
    ]
    assert spans_of(text, messages) == "<system>be brief</><user>|juliet</><assistant>"


def test_tail_counts_tokens_of_the_last_user_turn_only() -> None:
    text = rendered(("user", DOCUMENT), ("assistant", "well well"), ("user", "why is it so"))
    messages: list[dict[str, object]] = [
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": "well well"},
        {"role": "user", "content": "why is it so"},
    ]
    assert spans_of(text, messages, tail_tokens=2) == (
        "<user>|</><assistant>|</><user>|it so</><assistant>"
    )


def test_a_tail_longer_than_the_turn_stops_at_the_turn() -> None:
    text = rendered(("user", DOCUMENT), ("assistant", "well"), ("user", "why"))
    messages: list[dict[str, object]] = [
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": "well"},
        {"role": "user", "content": "why"},
    ]
    assert spans_of(text, messages, tail_tokens=64) == (
        "<user>|</><assistant>|</><user>why</><assistant>"
    )


def test_tool_schemas_before_the_first_user_content_are_protected() -> None:
    text = "<tools>lookup key</>" + rendered(("user", DOCUMENT))
    messages: list[dict[str, object]] = [{"role": "user", "content": DOCUMENT}]
    assert spans_of(text, messages).startswith("<tools>lookup key</><user>|")


def test_a_content_that_the_template_trims_is_found() -> None:
    text = rendered(("user", DOCUMENT))
    messages: list[dict[str, object]] = [{"role": "user", "content": f"\n  {DOCUMENT} \n"}]
    assert spans_of(text, messages) == "<user>|juliet</><assistant>"


def test_a_content_of_parts_is_found_part_by_part() -> None:
    text = rendered(("user", "one two three\nfour five six"))
    parts = [{"type": "text", "text": "one two three"}, {"type": "text", "text": "four five six"}]
    messages: list[dict[str, object]] = [{"role": "user", "content": parts}]
    # The joint is the template's own text, so the token that holds it stays.
    assert spans_of(text, messages) == "<user>|three\nfour|six</><assistant>"


def test_an_altered_content_leaves_its_region_unprotected() -> None:
    text = rendered(("system", "be brief"), ("user", DOCUMENT.upper()), ("assistant", "fine"))
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": "fine"},
    ]
    assert spans_of(text, messages) == "<system>be brief|</><assistant>"


def test_an_altered_system_message_stays_protected() -> None:
    text = rendered(("system", "BE BRIEF"), ("user", DOCUMENT))
    messages: list[dict[str, object]] = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": DOCUMENT},
    ]
    assert spans_of(text, messages) == "<system>BE BRIEF</><user>|juliet</><assistant>"


def test_every_occurrence_of_a_protected_substring_survives() -> None:
    assert spans_of("one two one two three", None, ("two",)) == "two|two"
    assert spans_of("one two one two three", None, ("wo o",)) == "two one"
    assert spans_of("one two one two three", None, ("absent",)) == ""


REASONING = "well kilo lima mike november"


@pytest.mark.parametrize("field", ["reasoning", "reasoning_content"])
def test_reasoning_may_be_pruned_where_the_template_writes_it(field: str) -> None:
    messages: list[dict[str, object]] = [
        {"role": "user", "content": DOCUMENT},
        {"role": "assistant", "content": "", field: f" {REASONING}\n"},
        {"role": "tool", "content": "found it"},
    ]
    written = (
        f"<user>{DOCUMENT}</><assistant><think>{REASONING}</think><call>find</call></>"
        "<tool>found it</><assistant>"
    )
    kept = spans_of(written, messages)
    assert "kilo" not in kept
    assert "<assistant><think>|</think><call>find</call></><tool>|</><assistant>" in kept
    left_out = written.replace(f"<think>{REASONING}</think>", "")
    assert "</><assistant><call>find</call></><tool>|" in spans_of(left_out, messages)


def test_reasoning_is_looked_for_beside_its_own_message_alone() -> None:
    messages: list[dict[str, object]] = [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three", "reasoning": "four"},  # left out
        {"role": "user", "content": "four five six"},
    ]
    text = rendered(("user", "one two"), ("assistant", "three"), ("user", "four five six"))
    without = [{"role": each["role"], "content": each["content"]} for each in messages]
    assert spans_of(text, messages) == spans_of(text, without)


def test_very_many_reasonings_take_linear_time() -> None:
    def make(size: int) -> Callable[[], object]:
        text = "x" * size
        offsets = characters(text)
        messages = [{"role": "assistant", "content": "", "reasoning": "y"}] * (size // 8)
        return lambda: protected_spans(text, offsets, messages, (), 4)

    assert_linear(make, 8_000)


def test_a_plain_completion_protects_nothing_by_itself() -> None:
    assert spans_of(DOCUMENT, None) == ""


@pytest.mark.parametrize("content", [None, 7, [], [{"type": "image_url"}], [None], "", "   "])
def test_odd_contents_do_not_fail(content: object) -> None:
    text = rendered(("user", DOCUMENT))
    messages: list[dict[str, object]] = [{"role": "user", "content": content}, {"content": "x"}]
    protected_spans(text, words(text), messages, (), 4)


def test_special_tokens_are_spans() -> None:
    assert special_spans([1, 7, 8, 2, 2], {1, 2}) == (Span(0, 1), Span(3, 5))


def test_merging_joins_touching_spans() -> None:
    spans = [Span(4, 6), Span(0, 2), Span(2, 4), Span(8, 8), Span(9, 10)]
    assert merge_spans(spans) == (Span(0, 6), Span(9, 10))


turns = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["system", "user", "assistant", "tool"]),
            "content": st.text("ab \n<>é", max_size=20),
        }
    ),
    max_size=5,
)


@given(turns, st.lists(st.text("ab", min_size=1, max_size=3), max_size=2), st.integers(1, 9))
def test_spans_are_sorted_disjoint_and_inside(
    messages: list[dict[str, str]], protect: list[str], tail_tokens: int
) -> None:
    text = rendered(*((each["role"], each["content"]) for each in messages))
    offsets = words(text)
    spans = protected_spans(text, offsets, messages, protect, tail_tokens)
    assert all(0 <= span.start < span.stop <= len(offsets) for span in spans)
    assert all(left.stop < right.start for left, right in pairwise(spans))


@given(st.text("ab \n<>é", max_size=40), st.text("ab é", min_size=1, max_size=3))
def test_no_token_of_a_protected_substring_is_lost(text: str, wanted: str) -> None:
    offsets = characters(text)
    kept = {i for s in protected_spans(text, offsets, None, (wanted,), 1) for i in range(*_ends(s))}
    lost = [i for i in range(len(text)) if text.startswith(wanted, i) and i not in kept]
    assert lost == []


@given(turns)
def test_system_messages_that_the_template_keeps_are_never_pruned(
    messages: list[dict[str, str]],
) -> None:
    text = rendered(*((each["role"], each["content"]) for each in messages))
    offsets = characters(text)
    only_system = [each for each in messages if each["role"] == "system"]
    kept = {i for s in protected_spans(text, offsets, only_system, (), 1) for i in range(*_ends(s))}
    if only_system:
        assert kept == set(range(len(text)))


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop


FENCED_TEXT = "look at alpha \n```python\ndef f(): pass\n``` \nand bravo \n~~~\nmore code\n~~~ end"


def test_fenced_code_is_protected_where_the_deployment_enables_it() -> None:
    offsets = words(FENCED_TEXT)
    spans = protected_spans(FENCED_TEXT, offsets, None, (), 1, fences=True)
    kept = protected_text(FENCED_TEXT, spans)
    assert "def f(): pass" in kept
    assert "more code" in kept
    assert "bravo" not in kept
    assert "look" not in kept
    assert protected_spans(FENCED_TEXT, offsets, None, (), 1) == ()


def test_a_fence_left_open_protects_to_the_end() -> None:
    text = "look at this\n```\nalpha bravo charlie"
    spans = protected_spans(text, words(text), None, (), 1, fences=True)
    assert protected_text(text, spans).endswith("alpha bravo charlie")
    assert not protected_text(text, spans).startswith("look")


def test_a_piece_that_the_template_changes_is_named() -> None:
    messages = [{"role": "user", "content": "alpha  bravo"}]
    assert altered_piece("<user>alpha bravo", messages, ("alpha", "a  b")) == "a  b"
    assert altered_piece("<user>alpha bravo", messages, ("alpha", "absent")) is None


@given(st.text("ab", max_size=60), st.lists(st.text("ab", min_size=1, max_size=9), max_size=4))
def test_every_character_of_every_occurrence_is_covered(text: str, pieces: list[str]) -> None:
    wanted = {
        i
        for piece in pieces
        for start in range(len(text))
        if text.startswith(piece, start)
        for i in range(start, start + len(piece))
    }
    ranges = find_occurrences(text, pieces, lambda: False).tolist()
    assert [i for start, stop in ranges for i in range(start, stop)] == sorted(wanted)
    assert all(left[1] < right[0] for left, right in pairwise(ranges))


def test_occurrences_over_the_edge_of_a_window_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specprefill.core.occurrences._WINDOW", 8)
    text = "....abcdefghij.....abcdefghij"
    assert find_occurrences(text, ["fghij", "abcdefghij", "zz"], lambda: False).tolist() == [
        [4, 14],
        [19, 29],
    ]


def test_a_cancelled_search_ends() -> None:
    with pytest.raises(Cancelled):
        find_occurrences("a" * 100, ["a", "b"], lambda: True)


def _protecting(text: Callable[[int], str], piece: Callable[[int], str]) -> Callable[[int], object]:
    def make(size: int) -> Callable[[], object]:
        whole = text(size)
        offsets = characters(whole)
        return lambda: protected_spans(whole, offsets, None, (piece(size),) * 64, 4)

    return make


@pytest.mark.parametrize(
    ("text", "piece"),
    [
        (lambda size: "a" * size, lambda _: "a"),
        (lambda size: "ab" * (size // 2), lambda _: "a"),  # as many spans as there can be
        (lambda size: "a" * size, lambda size: "a" * (size // 2)),  # as many comparisons
        (lambda size: "a" * size, lambda size: "a" * (size // 2) + "b"),
    ],
)
def test_protecting_costs_one_walk_of_the_text(
    text: Callable[[int], str], piece: Callable[[int], str]
) -> None:
    assert_linear(_protecting(text, piece), 100_000)


@pytest.mark.parametrize("content", ["alpha", "never in the text"])
def test_finding_messages_costs_one_walk_of_the_text(content: str) -> None:
    def make(count: int) -> Callable[[], object]:
        text = "<user>alpha</>" * count
        offsets = characters(text)
        messages = [{"role": "user", "content": content}] * count
        return lambda: protected_spans(text, offsets, messages, (), 4)

    assert_linear(make, 4000)


def test_a_conversation_that_is_nowhere_in_the_text_is_protected_whole() -> None:
    text = "<user>" + "x" * 100
    messages = [{"role": "user", "content": "never in the text"}] * 1000
    assert protected_spans(text, characters(text), messages, (), 4) == (Span(0, len(text)),)
