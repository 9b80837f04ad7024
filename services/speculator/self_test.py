"""Tests that the draft model can choose at all: it must keep generated facts.

A draft that is truncated, wrongly converted or mislabelled scores like any other,
and every answer that needed what it dropped is lost in silence. So each replica asks itself a few
questions when it starts. The prompts are the same every time.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from transformers import AutoTokenizer

from ..config import local_path
from ..core.errors import SpecPrefillError
from ..core.keep_rate import AutoKeep
from ..core.plan import can_choose
from ..core.selection import SelectionPolicy
from ..core.types import Plan, PlanKind, Reason, Request, Selection, Span
from ..synthetic.needles import DEFAULT_SYSTEM, NeedlePrompt, needle_prompt, render

logger = logging.getLogger(__name__)

PROMPTS, PROMPT_TOKENS, RECORDS = 8, 640, 6
KEEP = 0.2
POLICY = SelectionPolicy(
    chunk_tokens=32,
    min_kept_tokens=1,
    sink_tokens=4,
    tail_tokens=64,
    block_tokens=1,
    next_chunk_share=0.0,
    auto=AutoKeep(least_certainty=0.0),
    carry_over=False,
    whole_turn_tokens=0,
)
LEAST_PROMPTS = 4  # fewer prove nothing
TIMEOUT_S = 120.0  # for all of them
_PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, KEEP)


class SelectionService(Protocol):
    """The speculator service."""

    async def select(
        self, request: Request, plan: Plan, timeout_s: float, policy: SelectionPolicy | None = None
    ) -> Selection:
        """Keep about `plan.keep` of the prompt."""
        ...


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt in the main model's tokens, and the place of its answer."""

    prompt: tuple[int, ...]
    gold: Span


async def self_test(service: SelectionService, main_path: str) -> float | None:
    """Return the share of facts that the service keeps; None: it could not be found out."""
    try:
        asked = await asyncio.to_thread(questions, main_path)
    except (OSError, ValueError) as error:  # a tokenizer that is missing, or cannot render a chat
        logger.warning("self-test: no prompts for %s: %s", main_path, error)
        return None
    kept: list[bool] = []
    try:
        async with asyncio.timeout(TIMEOUT_S):
            for number, question in enumerate(asked):
                kept.append(await _keeps_answer(service, number, question))
    except (TimeoutError, SpecPrefillError) as error:
        logger.warning("self-test: ended after %d of %d prompts: %r", len(kept), PROMPTS, error)
    if len(kept) < LEAST_PROMPTS:
        return None
    share = sum(kept) / len(kept)
    logger.log(
        logging.INFO if can_choose(share) else logging.ERROR,
        "self-test: the speculator keeps %d of %d facts%s",
        sum(kept),
        len(kept),
        "" if can_choose(share) else ": it cannot choose, prompts are pruned only where asked",
    )
    return share


def questions(main_path: str) -> list[Question]:
    """Return the prompts. Raises OSError or ValueError where the tokenizer cannot be used."""
    tokenizer = AutoTokenizer.from_pretrained(local_path(main_path))
    chat = tokenizer if tokenizer.chat_template else _Plain(tokenizer)
    made = (
        needle_prompt(seed, PROMPT_TOKENS, chat, records=RECORDS, system=DEFAULT_SYSTEM)
        for seed in range(PROMPTS)
    )
    return list(_questions(made, tokenizer, chat))


def _questions(made: Iterator[NeedlePrompt], tokenizer: Any, chat: Any) -> Iterator[Question]:
    for needle in made:
        text = render(needle.messages, chat)
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        gold = _tokens_of(text.find(needle.gold), len(needle.gold), encoded["offset_mapping"])
        if gold is not None:
            yield Question(tuple(encoded["input_ids"]), gold)


def _tokens_of(start: int, length: int, offsets: Sequence[tuple[int, int]]) -> Span | None:
    """Return the tokens that cover `length` characters from `start`."""
    if start < 0:
        return None
    covering = [
        place
        for place, (first, last) in enumerate(offsets)
        if first < start + length and last > start
    ]
    return Span(covering[0], covering[-1] + 1) if covering else None


async def _keeps_answer(service: SelectionService, number: int, question: Question) -> bool:
    request = Request(f"self-test-{number}", question.prompt, b"")
    selection = await service.select(request, _PLAN, TIMEOUT_S, POLICY)
    pruned = selection.plan.kind is PlanKind.PRUNE
    gold = question.gold
    return pruned and any(
        run.start <= gold.start and gold.stop <= run.stop for run in selection.runs
    )


class _Plain:
    """A tokenizer of a base model, which knows no conversations."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def apply_chat_template(
        self, conversation: Any, /, *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        del tokenize, add_generation_prompt
        return "\n\n".join(message["content"] for message in conversation)

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens)
