"""Measures how much of each head's attention lies on what the answer needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ...core.types import Span
from ...speculator.method import PAPER, Queries, ScoringMethod
from ...speculator.rating import attention_of
from ...speculator.reading import Reading
from ...speculator.scorer import BLOCK_TOKENS, Scorer

Masses = NDArray[np.float64]  # [layers, heads], shares of the attention

NULL_QUESTION = "N/A"


@dataclass(frozen=True, slots=True)
class NullQuestion:
    """The end of a prompt that asks for nothing.

    What a head looks at when nobody asks is no retrieval (Contextual calibration of in-context
    re-ranking, arXiv 2410.02642, section 3.2).
    """

    ids: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> NullQuestion:
        """Render it with the tokenizer's chat template."""
        text = str(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": NULL_QUESTION}],
                tokenize=False,
                add_generation_prompt=True,
            )
        )
        end = text[text.rindex(NULL_QUESTION) :]
        return cls(tuple(tokenizer.encode(end, add_special_tokens=False)))


def gold_masses(
    scorer: Scorer, reading: Reading, gold: Sequence[Span], null: NullQuestion
) -> dict[Queries, Masses]:
    """Return by kind of queries the attention on the gold, less that of the null question.

    `reading` has looked ahead, with its question recorded, and is remembered by the scorer.
    """
    places = torch.tensor([place for span in gold for place in range(span.start, span.stop)])
    places = places.to(reading.layout.device)
    idle = _idle_masses(scorer, reading, places, null)
    return {
        Queries.LOOK_AHEAD: _masses(
            reading,
            lambda row: torch.stack(reading.queries[row], dim=1),
            places,
            in_prompt=False,
        )
        - idle,
        Queries.QUESTION: _masses(
            reading, reading.question_queries, places, in_prompt=not reading.echo
        )
        - idle,
    }


def _idle_masses(scorer: Scorer, asked: Reading, gold: Tensor, null: NullQuestion) -> Masses:
    """Return the same of the prompt whose question is the null one."""
    prompt = (*asked.prompt[: asked.question_start], *null.ids)
    reading = Reading(
        prompt,
        asked.layout,
        len(prompt),
        question_tokens=len(null.ids),
        looks_ahead=False,
    )
    known = scorer.prefix.find_longest(prompt)
    with torch.inference_mode():
        reading.restore(known[: reading.question_start // BLOCK_TOKENS])
    scorer.read([reading])
    inside = gold[gold < len(prompt)]
    return _masses(reading, reading.question_queries, inside, in_prompt=True)


def _masses(
    reading: Reading, queries_of: Callable[[int], Tensor], gold: Tensor, *, in_prompt: bool
) -> Masses:
    """Return the mean over the queries; 0 in layers that see a window of the prompt."""
    layout = reading.layout
    found = []
    with torch.inference_mode():
        for row, layer in enumerate(layout.layers):
            some = attention_of(reading, row, queries_of(row), None, in_prompt=in_prompt)
            rows = [weights[:, :, gold].sum(dim=-1).mean(dim=1) for weights in some]
            masses = torch.cat(rows)
            found.append(masses if layer in layout.scoring_layers else torch.zeros_like(masses))
    stacked: Masses = torch.stack(found).double().cpu().numpy()
    return stacked


def best_heads(masses: Masses, layers: Sequence[int], count: int, last: int) -> ScoringMethod:
    """Return the `count` heads with the highest masses in the layers up to `last`.

    The method is the paper's but for the heads. Heads that look away from the gold never count.
    """
    allowed = np.where((np.asarray(layers) <= last)[:, None], masses, -np.inf)
    order = np.argsort(-allowed, axis=None, kind="stable")[:count]
    heads: dict[int, tuple[int, ...]] = {}
    for flat in order.tolist():
        row, head = divmod(flat, masses.shape[1])
        if allowed[row, head] > 0.0:
            heads[layers[row]] = (*heads.get(layers[row], ()), head)
    ordered = {layer: tuple(sorted(heads[layer])) for layer in sorted(heads)}
    return ScoringMethod(ordered or None, PAPER.reduction, PAPER.queries)
