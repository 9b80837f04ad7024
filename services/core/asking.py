"""Finds the question in a prompt, and where it ends. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .protection import Offsets, TokenIndex, locate_contents
from .types import Span

ASKED_TOKENS = 32  # the last of the user's words, and of the call
RESULT_ROLES = ("tool", "function")


def asked_spans(
    text: str, offsets: Offsets, messages: Sequence[Mapping[str, Any]]
) -> tuple[Span, ...]:
    """Return the end of the last user turn and of the call whose results end the prompt.

    `text` is the rendered prompt, `offsets` [N, 2] the characters of its tokens. Disjoint and in
    order. Empty where no tool's result comes last: then the prompt's own end asks.
    """
    first = _first_result(messages)
    if first is None:
        return ()
    contents = locate_contents(text, messages)
    index = TokenIndex(offsets)
    turns = [index.span(*each.place) for each in contents if each.role == "user" and each.place]
    results = [index.span(*each.place) for each in contents if each.message >= first and each.place]
    asked = [_end_of(turn) for turn in turns[-1:]]
    called_from = asked[-1].stop if asked else 0
    asked += [_end_of(Span(called_from, result.start)) for result in results[:1]]
    return tuple(span for span in asked if span.start < span.stop)


def opening_tokens(text: str, offsets: Offsets, messages: Sequence[Mapping[str, Any]]) -> int:
    """Count the last tokens, behind the last message's content: they open the answer.

    `text` and `offsets` as in `asked_spans`. The prompt of the next turn may lack them. 0 where
    the template altered that content.
    """
    contents = locate_contents(text, messages)
    last = contents[-1].place if contents else None
    return 0 if last is None else len(offsets) - TokenIndex(offsets).span(*last).stop


def _end_of(span: Span) -> Span:
    return Span(max(span.start, span.stop - ASKED_TOKENS), span.stop)


def _first_result(messages: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the number of the first of the tools' results at the end; None: there are none."""
    number = len(messages)
    while number > 0 and messages[number - 1].get("role") in RESULT_ROLES:
        number -= 1
    return number if number < len(messages) else None
