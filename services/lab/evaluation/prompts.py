"""A task as the service would see it: token ids, protected spans, and the gold's spans."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ...core.asking import asked_spans
from ...core.protection import merge_spans, protected_spans, special_spans
from ...core.types import Selection, Span
from ...gateway.openai.offsets import PromptOffsets
from ..families.fitting import render
from ..families.task import Task
from .gold import survival


@dataclass(frozen=True, slots=True)
class RenderedTask:
    """A rendered task."""

    ids: tuple[int, ...]
    protected: tuple[Span, ...]
    gold: tuple[Span, ...]
    asked: tuple[Span, ...] = ()  # see `Request`


class Renderer:
    """Renders tasks with one tokenizer, and marks spans by the gateway's own rules."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tail_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._offsets = PromptOffsets(tokenizer)
        self._tail_tokens = tail_tokens

    def prompt(self, task: Task) -> RenderedTask:
        """Render a task. Raises ValueError for a tokenizer without character offsets."""
        text = render(task.messages, task.tools, self.tokenizer)
        ids = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        offsets = self._offsets.find(text, ids)
        if offsets is None:
            raise ValueError("the tokenizer returns no character offsets: use a fast one")
        spans = protected_spans(text, offsets, list(task.messages), (), self._tail_tokens)
        special = special_spans(ids, self._offsets.special_ids)
        places = [(start := text.index(piece), start + len(piece)) for piece in task.gold]
        gold = [
            [i for i, (left, right) in enumerate(offsets) if left < stop and right > start]
            for start, stop in places
        ]
        return RenderedTask(
            ids=ids,
            protected=merge_spans(special + spans),
            gold=tuple(Span(tokens[0], tokens[-1] + 1) for tokens in gold),
            asked=asked_spans(text, offsets, task.messages),
        )

    def answer_ids(self, task: Task) -> tuple[int, ...]:
        """Return the tokens of the right answer: its references."""
        text = ", ".join(task.references)
        return tuple(self.tokenizer.encode(text, add_special_tokens=False))


def gold_kept(prompt: RenderedTask, selection: Selection) -> float | None:
    """Return the share of gold spans that are kept whole; None where nothing is gold."""
    return survival(prompt.gold, selection) if prompt.gold else None
