"""What of a prompt is protected from pruning."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specprefill.gateway.spans import merged, protected_spans, special_spans
from specprefill.types import Span

DOCUMENT = "alpha bravo charlie delta echo foxtrot golf hotel india juliet"


def words(text: str) -> list[tuple[int, int]]:
    """Markers are tokens, and so are words with their leading space, as in a byte-level BPE."""
    return [match.span() for match in re.finditer(r"<[^<>]*>| ?[^ <]+|.", text, re.DOTALL)]


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


def test_a_plain_completion_protects_nothing_by_itself() -> None:
    assert spans_of(DOCUMENT, None) == ""


@pytest.mark.parametrize("content", [None, 7, [], [{"type": "image_url"}], [None], "", "   "])
def test_odd_contents_do_not_fail(content: object) -> None:
    text = rendered(("user", DOCUMENT))
    messages: list[dict[str, object]] = [{"role": "user", "content": content}, {"content": "x"}]
    protected_spans(text, words(text), messages, (), 4)


def test_special_tokens_are_spans() -> None:
    assert special_spans([1, 7, 8, 2, 2], {1, 2}) == (Span(0, 1), Span(3, 5))


def test_merged_joins_what_touches() -> None:
    spans = [Span(4, 6), Span(0, 2), Span(2, 4), Span(8, 8), Span(9, 10)]
    assert merged(spans) == (Span(0, 6), Span(9, 10))


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
    offsets = [(i, i + 1) for i in range(len(text))]
    kept = {i for s in protected_spans(text, offsets, None, (wanted,), 1) for i in range(*_ends(s))}
    lost = [i for i in range(len(text)) if text.startswith(wanted, i) and i not in kept]
    assert lost == []


@given(turns)
def test_system_messages_that_the_template_keeps_are_never_pruned(
    messages: list[dict[str, str]],
) -> None:
    text = rendered(*((each["role"], each["content"]) for each in messages))
    offsets = [(i, i + 1) for i in range(len(text))]
    only_system = [each for each in messages if each["role"] == "system"]
    kept = {i for s in protected_spans(text, offsets, only_system, (), 1) for i in range(*_ends(s))}
    if only_system:
        assert kept == set(range(len(text)))


def _ends(span: Span) -> tuple[int, int]:
    return span.start, span.stop


FENCED_TEXT = "look at alpha \n```python\ndef f(): pass\n``` \nand bravo \n~~~\nmore code\n~~~ end"


def test_fenced_code_is_protected_where_the_deployment_says_so() -> None:
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
