"""Conversations: an answered request is followed by the next turn, which extends it.

The next turn holds the answer as it came, and a new message with a fact and a question about it;
every second one asks about the fact of the turn before. So each service reads what it wrote itself,
and each turn's answer can be checked.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ...synthetic import corpus
from ...synthetic.needles import filler_text
from ..families.fitting import TaskTokenizer
from .recorder import LoadPrompt
from .scenario import ConversationTurns

FollowUp = Callable[[LoadPrompt, str], LoadPrompt]  # a turn and its answer -> the next turn


@dataclass(frozen=True, slots=True)
class PlannedTurns:
    """The turns after a request."""

    more: int
    think_s: float  # from an answer to the next turn
    follow_up: FollowUp


class Conversationalist:
    """Writes one conversation's later turns; one seed is one sequence of messages."""

    def __init__(self, seed: int, turns: ConversationTurns, tokenizer: TaskTokenizer) -> None:
        self._rng = random.Random(f"conversation/{seed}")
        self._records = corpus.records(self._rng, turns.turns)
        self._turns = turns
        self._tokenizer = tokenizer
        self._turn = 1

    def follow_up(self, asked: LoadPrompt, answer: str) -> LoadPrompt:
        """Return the next turn."""
        self._turn += 1
        new, before = self._records[self._turn - 1], self._records[self._turn - 2]
        about = before if self._turn > 2 and self._turn % 2 == 1 else new
        text = filler_text(f"{self._rng.random()}", self._turns.growth_tokens, self._tokenizer)
        question = corpus.question(self._rng, about)
        said: tuple[Mapping[str, Any], ...] = (
            {"role": "assistant", "content": answer},
            {"role": "user", "content": f"{text} {new.text}\n\n{question}"},
        )
        return replace(
            asked,
            messages=(*asked.messages, *said),
            variant=f"{asked.variant.partition(', turn')[0]}, turn {self._turn}",
            score=lambda reply: float(about.value in reply),
        )
