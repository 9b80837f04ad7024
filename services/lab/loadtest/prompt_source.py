"""Requests whose answers can be checked, drawn from a scenario's kinds."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Self

import numpy as np

from ...config import local_path
from ..families.catalog import generate
from ..families.fitting import TaskTokenizer
from ..families.judging import score
from ..families.task import Task
from .arrivals import WHOLE, Part
from .conversations import Conversationalist, PlannedTurns
from .recorded_trace import TraceLine
from .recorder import LoadPrompt
from .scenario import ConversationTurns, Prompts
from .shared_beginnings import BLOCK_TOKENS, SharedBeginnings

_WARM_UP = 1 << 60  # a range of seeds that no counted request has
_SEEDS_OF_A_RUN = 1 << 24  # so that two runs of different seeds share no prompt
_LEAST_TOKENS = 256  # recorded prompts that are shorter are sent with as many: a task takes some


class UnknownTokenizer(Exception):
    """The tokenizer cannot be loaded; the message has the reason."""


class Source:
    """Makes prompts; one seed is one sequence of prompts, whatever is asked of the service.

    No prompt comes twice: a search would find it in the service's caches at its second rate. Only
    beginnings do, within a run, where a recorded trace shares them.
    """

    def __init__(self, tokenizer: TaskTokenizer, seed: int, part: Part = WHOLE) -> None:
        """`part`: those of other parts of a run share no prompt with these."""
        self._tokenizer = tokenizer
        self._beginnings = SharedBeginnings(tokenizer)
        self._seed = seed
        self._seeds = itertools.count(seed * _SEEDS_OF_A_RUN + part.place, part.of)

    @classmethod
    def load(cls, path: str, seed: int, part: Part = WHOLE) -> Self:
        """Load the tokenizer of a folder or a hub name. Raises UnknownTokenizer."""
        from transformers import AutoTokenizer

        try:
            return cls(AutoTokenizer.from_pretrained(local_path(path)), seed, part)
        except (OSError, ValueError) as error:
            raise UnknownTokenizer(f"tokenizer: {path}: {error}") from error

    def draw(
        self, kinds: Sequence[Prompts], count: int, rng: np.random.Generator
    ) -> list[LoadPrompt]:
        """Draw `count` prompts, their kinds by weight."""
        return [self._make(kind, next(self._seeds)) for kind in _draw_kinds(kinds, count, rng)]

    def draw_like(
        self,
        kinds: Sequence[Prompts],
        lines: Sequence[TraceLine],
        rng: np.random.Generator,
        run_seed: int,
    ) -> list[LoadPrompt]:
        """Draw one prompt per recorded request, of its length where it has one.

        Prompts of one `run_seed` share the beginnings that the trace shares, in every part.
        """
        return [
            self._make_like(_resize(kind, line), line.blocks, run_seed)
            for kind, line in zip(_draw_kinds(kinds, len(lines), rng), lines, strict=True)
        ]

    def conversations(self, turns: ConversationTurns, count: int) -> list[PlannedTurns]:
        """Return the later turns of `count` conversations."""
        writers = [
            Conversationalist(next(self._seeds), turns, self._tokenizer) for _ in range(count)
        ]
        return [PlannedTurns(turns.turns - 1, turns.think_s, each.follow_up) for each in writers]

    def warm_up(self, kind: Prompts, number: int) -> LoadPrompt:
        """Make a prompt of this kind that no run counts."""
        return self._make(kind, _WARM_UP + self._seed + number)

    def _make(self, kind: Prompts, seed: int) -> LoadPrompt:
        return _prompt(kind, generate(kind.family, seed, kind.prompt_tokens, self._tokenizer))

    def _make_like(self, kind: Prompts, blocks: Sequence[int], run_seed: int) -> LoadPrompt:
        shared = self._beginnings.shared(blocks, kind.prompt_tokens)
        own_tokens = kind.prompt_tokens - BLOCK_TOKENS * len(shared)
        task = generate(kind.family, next(self._seeds), own_tokens, self._tokenizer)
        return _prompt(kind, self._beginnings.begin(task, shared, run_seed))


def _prompt(kind: Prompts, task: Task) -> LoadPrompt:
    return LoadPrompt(
        messages=task.messages,
        family=kind.family,
        variant=kind.variant,
        keep=kind.keep,
        max_tokens=task.max_tokens if kind.max_tokens is None else kind.max_tokens,
        score=partial(score, task),
        tools=task.tools,
    )


def _draw_kinds(kinds: Sequence[Prompts], count: int, rng: np.random.Generator) -> list[Prompts]:
    weights = np.array([kind.weight for kind in kinds])
    places = rng.choice(len(kinds), size=count, p=weights / weights.sum())
    return [kinds[place] for place in places]


def _resize(kind: Prompts, line: TraceLine) -> Prompts:
    tokens = line.prompt_tokens
    at_least = None if tokens is None else max(tokens, _LEAST_TOKENS)
    recorded = {"prompt_tokens": at_least, "max_tokens": line.max_tokens}
    return kind.model_copy(update={name: n for name, n in recorded.items() if n is not None})
