"""Finds the parts of a rendered prompt that must survive pruning. Pure.

Protected are the template's own text, system and developer messages, everything before the
first user content (tool schemas), the end of the last user turn (the query), the caller's
own substrings, and special tokens. Other messages' contents and reasoning may
be pruned.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .occurrences import Ranges, find_occurrences, runs
from .types import Span

_KEPT_ROLES = ("system", "developer")
_REASONING = ("reasoning", "reasoning_content")  # vLLM's field, and the older one

# A fence opens at the start of a line and is closed by one as long; one left open ends the text.
_FENCED = re.compile(r"^(`{3,}|~{3,}).*?(?:^\1|\Z)", re.DOTALL | re.MULTILINE)

# A content that the template altered is searched for up to the text's end without success. After
# this many times the text's length, the rest of the conversation is protected as a whole.
_MOST_READ = 512

Offsets = NDArray[np.int64]  # [N, 2], per token: [start, stop) in characters, both ascending


class KeptBy(enum.StrEnum):
    """The reason why a span of a prompt is kept."""

    SYSTEM = "system"  # a system or developer message
    TOOLS = "tools"  # the schemas of the tools
    PROTECTED = "protected"  # the caller's own substrings
    CODE = "code"  # fenced code, where the deployment protects it
    TAIL = "tail"  # the end of the last user turn, and of the prompt
    TEMPLATE = "template"  # the chat template's own text, and special tokens
    SINK = "sink"  # the first tokens
    BLOCK = "block"  # the rest of a KV block that a protected prefix ends in
    SCORED = "scored"  # the chunk's score
    STATIC = "static"  # chosen without scores: the speculator had no time
    WHOLE_PROMPT = "whole_prompt"  # a dense plan drops nothing


@dataclass(frozen=True, slots=True)
class Content:
    """One piece of message text and its place in the rendered prompt (None: altered)."""

    role: str
    place: tuple[int, int] | None
    message: int  # its number


@dataclass(frozen=True, slots=True, kw_only=True)
class Protection:
    """The parts of one prompt that must survive."""

    messages: Sequence[Mapping[str, Any]] | None  # an OpenAI list; None: a plain completion
    protect: Sequence[str] = ()  # the caller's own substrings
    tail_tokens: int  # of the last user turn
    fences: bool = False  # protect fenced code, too
    tool_names: Sequence[str] = ()  # template text with one of them holds the tools' schemas


def protected_spans(
    text: str,
    offsets: Offsets,
    messages: Sequence[Mapping[str, Any]] | None,
    protect: Sequence[str],
    tail_tokens: int,
    *,
    fences: bool = False,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> tuple[Span, ...]:
    """Return the token spans that must survive: sorted, disjoint, not adjacent.

    A content that the template altered cannot be found; the region where it must lie is then not
    protected. Raises `occurrences.Cancelled` soon after `is_cancelled()`.
    """
    rules = Protection(messages=messages, protect=protect, tail_tokens=tail_tokens, fences=fences)
    index = TokenIndex(offsets)
    found = _find_ranges(text, rules, index, is_cancelled)
    return index.spans(np.concatenate(list(found.ranges.values())), found.query)


def protected_by_reason(
    text: str,
    offsets: Offsets,
    rules: Protection,
    is_cancelled: Callable[[], bool] = lambda: False,
) -> dict[KeptBy, tuple[Span, ...]]:
    """Return the spans of `protected_spans`, by reason; a token may have several."""
    index = TokenIndex(offsets)
    found = _find_ranges(text, rules, index, is_cancelled)
    spans = {reason: index.spans(ranges, ()) for reason, ranges in found.ranges.items()}
    return {**spans, KeptBy.TAIL: merge_spans(found.query)}


@dataclass(frozen=True, slots=True)
class _Found:
    """Character ranges by reason, and the tokens of the query."""

    ranges: dict[KeptBy, Ranges]
    query: Sequence[Span]


def _find_ranges(
    text: str, rules: Protection, index: TokenIndex, is_cancelled: Callable[[], bool]
) -> _Found:
    places: dict[KeptBy, list[tuple[int, int]]] = {KeptBy.CODE: []}
    query: list[Span] = []
    if rules.fences:
        places[KeptBy.CODE] = [match.span() for match in _FENCED.finditer(text)]
    if rules.messages:
        contents = locate_contents(text, rules.messages)
        places |= _split_template(text, contents, rules.tool_names)
        query = _query_spans(contents, index, rules.tail_tokens)
    ranges = {
        reason: np.array(each, dtype=np.int64).reshape(-1, 2) for reason, each in places.items()
    }
    ranges[KeptBy.PROTECTED] = find_occurrences(text, rules.protect, is_cancelled)
    return _Found(ranges, query)


def altered_piece(
    text: str, messages: Sequence[Mapping[str, Any]], protect: Sequence[str]
) -> str | None:
    """Return the first piece that is in a message but not in the rendered text."""
    missing = [piece for piece in dict.fromkeys(protect) if piece not in text]
    if not missing:
        return None
    sent = [part for message in messages for part in content_texts(message.get("content"))]
    return next((piece for piece in missing if any(piece in part for part in sent)), None)


def special_spans(token_ids: Sequence[int], special: Collection[int]) -> tuple[Span, ...]:
    """Return the spans of special tokens: turn markers and the like."""
    return merge_spans(Span(i, i + 1) for i, token in enumerate(token_ids) if token in special)


def merge_spans(spans: Iterator[Span] | Sequence[Span]) -> tuple[Span, ...]:
    """Return the union of `spans`: sorted, disjoint, not adjacent; empty spans vanish."""
    union: list[Span] = []
    for span in sorted(span for span in spans if span.start < span.stop):
        if union and span.start <= union[-1].stop:
            union[-1] = Span(union[-1].start, max(union[-1].stop, span.stop))
        else:
            union.append(span)
    return tuple(union)


def content_texts(content: object) -> list[str]:
    """Return the texts of a message content: a string, or a list of parts, some with text."""
    if isinstance(content, str):
        return [content]
    if not isinstance(content, list):
        return []
    texts = [part.get("text") for part in content if isinstance(part, Mapping)]
    return [text for text in texts if isinstance(text, str)]


class TokenIndex:
    """Maps character ranges to token spans."""

    def __init__(self, offsets: Offsets) -> None:
        self._starts, self._stops = offsets[:, 0], offsets[:, 1]

    def span(self, start: int, stop: int) -> Span:
        """Return the tokens that overlap the characters `[start, stop)`."""
        ((first, last),) = self._tokens(np.array([(start, stop)])).tolist()
        return Span(first, last)

    def spans(self, ranges: Ranges, more: Sequence[Span]) -> tuple[Span, ...]:
        """Return the union of the tokens that overlap any of the ranges, and of `more`."""
        found = self._tokens(ranges)
        edges = np.zeros(len(self._starts) + 1, dtype=np.int64)
        np.add.at(edges, found[:, 0], 1)
        np.add.at(edges, found[:, 1], -1)
        kept = np.cumsum(edges[:-1]) > 0
        for span in more:
            kept[span.start : span.stop] = True
        return tuple(Span(start, stop) for start, stop in runs(kept).tolist())

    def _tokens(self, ranges: Ranges) -> NDArray[np.int64]:
        first = np.searchsorted(self._stops, ranges[:, 0], side="right")
        last = np.searchsorted(self._starts, ranges[:, 1], side="left")
        return np.stack((first, np.maximum(first, last)), axis=1)


def locate_contents(text: str, messages: Sequence[Mapping[str, Any]]) -> list[Content]:
    """Find each content after the one before it; templates keep the order but trim the ends."""
    contents: list[Content] = []
    cursor, unread = 0, _MOST_READ * len(text)
    for number, message in enumerate(messages):
        role = str(message.get("role"))
        for part in content_texts(message.get("content")):
            wanted = part.strip()
            if not wanted:
                continue
            start = text.find(wanted, cursor)
            unread -= (len(text) if start < 0 else start) - cursor
            if unread < 0:
                return [*contents, Content(_KEPT_ROLES[0], (cursor, len(text)), number)]
            if start < 0:
                contents.append(Content(role, None, number))
                continue
            cursor = start + len(wanted)
            contents.append(Content(role, (start, cursor), number))
    return _with_reasoning(text, messages, contents, unread)


def _with_reasoning(
    text: str, messages: Sequence[Mapping[str, Any]], contents: list[Content], unread: int
) -> list[Content]:
    """Add the reasoning of assistants' turns, where the template writes it: before their content.

    Most templates leave it out of earlier turns: then it lies nowhere, and nothing is uncertain.
    At most `unread` characters are searched.
    """
    merged: list[Content] = []
    waiting = iter([*contents, None])
    following = next(waiting)
    cursor = 0
    for number, reasoning in _reasonings(messages):
        while following is not None and following.message < number:
            merged.append(following)
            cursor = cursor if following.place is None else following.place[1]
            following = next(waiting)
        stop = len(text) if following is None or following.place is None else following.place[0]
        start = text.find(reasoning, cursor, stop) if unread > 0 else -1
        unread -= (stop if start < 0 else start) - cursor
        if start >= 0:
            cursor = start + len(reasoning)
            merged.append(Content("assistant", (start, cursor), number))
    while following is not None:
        merged.append(following)
        following = next(waiting)
    return merged


def _reasonings(messages: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, str]]:
    """Yield the number of each message that has reasoning, and the reasoning."""
    for number, message in enumerate(messages):
        for field in _REASONING:
            reasoning = message.get(field)
            if isinstance(reasoning, str) and reasoning.strip():
                yield number, reasoning.strip()
                break


def _split_template(
    text: str, contents: Sequence[Content], tool_names: Sequence[str]
) -> dict[KeptBy, list[tuple[int, int]]]:
    """Return the ranges of the text outside the contents that may be pruned, by reason."""
    names = [name for name in tool_names if name]
    found: dict[KeptBy, list[tuple[int, int]]] = {
        KeptBy.SYSTEM: [each.place for each in contents if _is_kept(each) and each.place],
        KeptBy.TOOLS: [],
        KeptBy.TEMPLATE: [],
    }
    for start, stop in _template_text(contents, len(text)):
        holds_tools = any(text.find(name, start, stop) >= 0 for name in names)
        found[KeptBy.TOOLS if holds_tools else KeptBy.TEMPLATE].append((start, stop))
    return found


def _is_kept(content: Content) -> bool:
    return content.role in _KEPT_ROLES


def _template_text(contents: Sequence[Content], length: int) -> Iterator[tuple[int, int]]:
    """Yield the ranges of the template's own text, before, between and after the contents."""
    known_until: int | None = 0  # None: an altered content lies somewhere after the last found one
    for content in contents:
        if content.place is None:
            known_until = known_until if _is_kept(content) else None
            continue
        start, stop = content.place
        if known_until is not None:
            yield known_until, start
        known_until = stop
    if known_until is not None:
        yield known_until, length


def _query_spans(contents: Sequence[Content], index: TokenIndex, tail_tokens: int) -> list[Span]:
    """Return the last tokens of the last user turn."""
    asked = [content.place for content in contents if content.role == "user"]
    if not asked or asked[-1] is None:
        return []
    turn = index.span(*asked[-1])
    return [Span(max(turn.start, turn.stop - tail_tokens), turn.stop)]
