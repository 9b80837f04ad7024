"""Which parts of a rendered prompt must survive pruning. Pure: text, offsets and messages in.

Protected are the template's own text, system and developer messages, everything before the
first user content (tool schemas), the end of the last user turn (the query), the caller's
own substrings, and special tokens. The contents of other messages may be pruned.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..types import Span

_KEPT_ROLES = ("system", "developer")

# A fence opens at the start of a line and is closed by one as long; one left open ends the text.
_FENCED = re.compile(r"^(`{3,}|~{3,}).*?(?:^\1|\Z)", re.DOTALL | re.MULTILINE)

Offsets = Sequence[tuple[int, int]]  # per token: [start, stop) in characters, both ascending


@dataclass(frozen=True, slots=True)
class _Content:
    """One piece of message text and where the rendered prompt holds it (None: altered)."""

    role: str
    place: tuple[int, int] | None


def protected_spans(
    text: str,
    offsets: Offsets,
    messages: Sequence[Mapping[str, Any]] | None,
    protect: Sequence[str],
    tail_tokens: int,
    *,
    fences: bool = False,
) -> tuple[Span, ...]:
    """Token spans that must survive: sorted, disjoint, not adjacent. `fences`: fenced code, too.

    `messages` is an OpenAI list, or None for a plain completion, where only `protect` counts.
    A content that the template altered is found nowhere; the region where it must lie is then
    not protected.
    """
    index = _TokenIndex(offsets)
    spans = [index.span(*place) for place in _occurrences(text, protect)]
    if fences:
        spans += [index.span(*match.span()) for match in _FENCED.finditer(text)]
    if messages:
        contents = _locate(text, messages)
        spans += [index.span(*place) for place in _template_text(text, contents)]
        spans += _query(contents, index, tail_tokens)
    return merged(spans)


def special_spans(token_ids: Sequence[int], special: Collection[int]) -> tuple[Span, ...]:
    """The spans of special tokens: turn markers and the like."""
    return merged(Span(i, i + 1) for i, token in enumerate(token_ids) if token in special)


def merged(spans: Iterator[Span] | Sequence[Span]) -> tuple[Span, ...]:
    """The union of `spans`: sorted, disjoint, not adjacent; empty spans vanish."""
    union: list[Span] = []
    for span in sorted(span for span in spans if span.start < span.stop):
        if union and span.start <= union[-1].stop:
            union[-1] = Span(union[-1].start, max(union[-1].stop, span.stop))
        else:
            union.append(span)
    return tuple(union)


def content_texts(content: object) -> list[str]:
    """The texts of a message content: a string, or a list of parts of which some hold text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return [text for text in texts if isinstance(text, str)]


class _TokenIndex:
    """Character ranges to token spans."""

    def __init__(self, offsets: Offsets) -> None:
        self._starts = [start for start, _ in offsets]
        self._stops = [stop for _, stop in offsets]

    def span(self, start: int, stop: int) -> Span:
        """The tokens that overlap the characters `[start, stop)`."""
        first = bisect_right(self._stops, start)
        return Span(first, max(first, bisect_left(self._starts, stop)))


def _locate(text: str, messages: Sequence[Mapping[str, Any]]) -> list[_Content]:
    """Find each content after the one before it; templates keep the order but trim the ends."""
    contents = []
    cursor = 0
    for message in messages:
        role = str(message.get("role"))
        for part in content_texts(message.get("content")):
            wanted = part.strip()
            if not wanted:
                continue
            start = text.find(wanted, cursor)
            if start < 0:
                contents.append(_Content(role, None))
                continue
            cursor = start + len(wanted)
            contents.append(_Content(role, (start, cursor)))
    return contents


def _template_text(text: str, contents: Sequence[_Content]) -> Iterator[tuple[int, int]]:
    """What is left of the text without the contents that may be pruned."""
    known_until: int | None = 0  # None: an altered content lies somewhere after the last found one
    for content in contents:
        if content.place is None:
            known_until = None if content.role not in _KEPT_ROLES else known_until
            continue
        start, stop = content.place
        if content.role in _KEPT_ROLES:
            yield start, stop
        if known_until is not None:
            yield known_until, start
        known_until = stop
    if known_until is not None:
        yield known_until, len(text)


def _query(contents: Sequence[_Content], index: _TokenIndex, tail_tokens: int) -> list[Span]:
    """The last tokens of the last user turn."""
    asked = [content.place for content in contents if content.role == "user"]
    if not asked or asked[-1] is None:
        return []
    turn = index.span(*asked[-1])
    return [Span(max(turn.start, turn.stop - tail_tokens), turn.stop)]


def _occurrences(text: str, wanted: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Every occurrence of every string, overlapping ones too."""
    for piece in wanted:
        start = text.find(piece) if piece else -1
        while start >= 0:
            yield start, start + len(piece)
            start = text.find(piece, start + 1)
