"""Generated tasks as the selection sees them: scores, protected spans, and the gold's spans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from specprefill.config import SelectionConfig, SpeculatorConfig, local_path
from specprefill.core.asking import asked_spans
from specprefill.core.protection import Offsets, merge_spans, protected_spans, special_spans
from specprefill.core.types import Span
from specprefill.gateway.openai.offsets import PromptOffsets
from specprefill.lab.families.fitting import render
from specprefill.lab.families.task import Task
from specprefill.speculator.chunking import Chunker
from specprefill.speculator.scorer import Scorer, load_scorer
from specprefill.speculator.translation import SamePrompt

from .keep_rates import ScoredPrompt


@dataclass(frozen=True, slots=True)
class TaskScorer:
    """The speculator and its tokenizer."""

    scorer: Scorer
    tokenizer: PreTrainedTokenizerFast
    offsets: PromptOffsets
    tail_tokens: int
    chunker: Chunker

    @classmethod
    def load(cls, config: SpeculatorConfig) -> Self:
        """Load the speculator with the selection's defaults."""
        selection = SelectionConfig()
        tokenizer = AutoTokenizer.from_pretrained(local_path(config.path))
        scorer = load_scorer(config, selection.pool_tokens)
        return cls(
            scorer,
            tokenizer,
            PromptOffsets(tokenizer),
            selection.tail_tokens,
            Chunker.of(selection, tokenizer),
        )

    def score_task(self, task: Task) -> ScoredPrompt:
        """Render, tokenise, mark and score one task."""
        text = render(task.messages, task.tools, self.tokenizer)
        prompt = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        offsets = self.offsets.find(text, prompt)
        if offsets is None:
            raise ValueError(f"{task.family}: the tokenizer returns no offsets")
        special = special_spans(prompt, self.offsets.special_ids)
        spans = protected_spans(text, offsets, task.messages, (), self.tail_tokens)
        asked = asked_spans(text, offsets, task.messages)
        echo = self.scorer.echo_of(SamePrompt(prompt), asked)
        with self.scorer.open_readings([prompt], echoes=[echo]) as (reading,):
            self.scorer.read([reading])
            self.scorer.look_ahead([reading])
            scores = self.scorer.rate(reading)
        return ScoredPrompt(
            family=task.family,
            scores=scores,
            certainty=reading.certainty,
            protected=merge_spans(special + spans),
            gold=tuple(_tokens(text.find(gold), len(gold), offsets) for gold in task.gold),
            chunks=self.chunker.chunks(prompt),
        )


def _tokens(start: int, length: int, offsets: Offsets) -> Span:
    """Return the tokens that overlap `length` characters from `start`."""
    inside = [i for i, (a, b) in enumerate(offsets) if a < start + length and b > start]
    return Span(inside[0], inside[-1] + 1)
