"""One task: the question, its answer, and the parts of the prompt that the answer needs."""

from __future__ import annotations

import enum
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]  # in OpenAI's form
Conversation = tuple[Message, ...]


class Scoring(enum.StrEnum):
    """The comparison of an answer with the references."""

    ALL_REFERENCES = "all_references"  # share of the references it contains (RULER's string match)
    NUMBER = "number"  # its last number is the reference
    COPY = "copy"  # lines quoted exactly, and similarity of the whole
    TOOL_CALL = "tool_call"  # the reference's name and arguments


@dataclass(frozen=True, slots=True)
class TaskDraft:
    """A task of a certain size, before its length is known. Fields as in `Task`."""

    messages: Conversation
    references: tuple[str, ...]
    gold: tuple[str, ...] = ()
    before: tuple[Conversation, ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()
    nonce: str | None = None


@dataclass(frozen=True, slots=True)
class Task:
    """A chat request with a checkable answer; equal for every keep rate and every arm."""

    family: str
    messages: Conversation
    references: tuple[str, ...]
    gold: tuple[str, ...]  # what the answer needs; each occurs once in the rendered prompt
    max_tokens: int
    scoring: Scoring
    prompt_tokens: int  # of the rendered chat with the generation prompt
    before: tuple[Conversation, ...] = ()  # requests that come first; their answers do not count
    tools: tuple[Mapping[str, Any], ...] = ()
    # Digits that a backend with a prefix cache replaces, so that the cache is cold; None: it may
    # be warm.
    nonce: str | None = None


@dataclass(frozen=True, slots=True)
class Order:
    """The request to a family for a draft. Equal orders give equal drafts."""

    rng: random.Random
    units: int  # of haystack: sentences, lines, pairs, words; the length grows with them
    prompt_tokens: int  # the length that is aimed at
