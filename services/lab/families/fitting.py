"""Fits a task to a prompt length by search over its haystack, as RULER's generators do."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from .task import Conversation, Order, TaskDraft

_PROBE_UNITS = 8


class TaskTokenizer(Protocol):
    """The two calls of a transformers tokenizer that fitting a length takes."""

    def apply_chat_template(
        self,
        conversation: Any,
        /,
        *,
        tools: Any = None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> Any: ...

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any: ...


def render(
    messages: Conversation, tools: Sequence[Mapping[str, Any]], tokenizer: TaskTokenizer
) -> str:
    """Return the text that is prefilled for this conversation."""
    return str(
        tokenizer.apply_chat_template(
            list(messages),
            tools=list(tools) or None,
            tokenize=False,
            add_generation_prompt=True,
        )
    )


def fit_draft(
    draft: Callable[[Order], TaskDraft],
    seed: str,
    least_units: int,
    prompt_tokens: int,
    tokenizer: TaskTokenizer,
) -> tuple[TaskDraft, int]:
    """Return the largest draft of at most `prompt_tokens` tokens, and its length.

    Raises ValueError where even `least_units` of haystack are too long.
    """

    def draft_of(units: int) -> TaskDraft:
        return draft(Order(random.Random(seed), units, prompt_tokens))

    def cost(units: int) -> int:
        made = draft_of(units)
        text = render(made.messages, made.tools, tokenizer)
        return len(tokenizer.encode(text, add_special_tokens=False))

    units, tokens = _most_units(cost, least_units, prompt_tokens)
    return draft_of(units), tokens


def _most_units(cost: Callable[[int], int], least: int, limit: int) -> tuple[int, int]:
    """Return the most units whose cost is within the limit, and that cost; it grows with them."""
    fits, fits_cost = least, cost(least)
    if fits_cost > limit:
        raise ValueError(f"{limit} tokens are too few: the shortest prompt has {fits_cost}")
    over, over_cost = least + _PROBE_UNITS, cost(least + _PROBE_UNITS)
    while over_cost <= limit:
        grown = 1 + (limit - fits_cost) * (over - fits) // max(1, over_cost - fits_cost)
        step = min(grown, over - least + (over - fits) * 64)
        fits, fits_cost, over = over, over_cost, over + step
        over_cost = cost(over)
    while over - fits > 1:
        share = (limit - fits_cost) / (over_cost - fits_cost)
        middle = min(over - 1, max(fits + 1, fits + int(share * (over - fits))))
        middle_cost = cost(middle)
        if middle_cost <= limit:
            fits, fits_cost = middle, middle_cost
        else:
            over, over_cost = middle, middle_cost
    return fits, fits_cost
