"""Needle prompts of a given length: a document with records, and a question about one of them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import corpus

DEFAULT_SYSTEM = "You are a helpful assistant."
TOKENS_PER_RECORD = 128
MIN_RECORDS, MAX_RECORDS = 2, 24
SHORTEST_SENTENCE_TOKENS = 9
POOL_SHARE = 0.5  # distinct sentences among the filler's


class ChatTokenizer(Protocol):
    """The two calls of a transformers tokenizer that fitting a length takes."""

    def apply_chat_template(
        self, conversation: Any, /, *, tokenize: bool, add_generation_prompt: bool
    ) -> Any: ...

    def encode(self, text: str, /, *, add_special_tokens: bool) -> Any: ...


@dataclass(frozen=True, slots=True)
class NeedlePrompt:
    """A chat request whose reply must contain `answer`."""

    messages: list[dict[str, str]]
    answer: str  # the asked key's value
    gold: str  # key and value as the document has them, once: all that the answer needs
    key: str
    depth: float  # share of the filler before the needle, 0..1
    prompt_tokens: int  # of the rendered chat with the generation prompt


def needle_prompt(
    seed: int | random.Random,
    prompt_tokens: int,
    tokenizer: ChatTokenizer,
    *,
    depth: float | None = None,
    records: int | None = None,
    system: str | None = DEFAULT_SYSTEM,
) -> NeedlePrompt:
    """Make one prompt of `prompt_tokens` tokens, give or take two.

    `depth` places the needle (0 first, 1 last; None: anywhere). `records` counts it and its
    distractors, half of which share a word with another key; None: more the longer the prompt.
    Raises ValueError where the length is too small for the records.
    """
    rng = seed if isinstance(seed, random.Random) else random.Random(seed)
    facts = corpus.records(rng, default_records(prompt_tokens) if records is None else records)
    depths = [rng.random() for _ in facts]
    if depth is not None:
        depths[0] = depth
    tail = f"\n\n{corpus.question(rng, facts[0])}"

    def messages(filler: Sequence[str]) -> list[dict[str, str]]:
        document = corpus.join(filler, facts, [round(share * len(filler)) for share in depths])
        user = {"role": "user", "content": document + tail}
        return [user] if system is None else [{"role": "system", "content": system}, user]

    spare = prompt_tokens - count_tokens(messages(()), tokenizer)
    if spare < 0:
        raise ValueError(
            f"{prompt_tokens} tokens cannot hold {len(facts)} records: {-spare} too few"
        )
    chat = messages(_filler(rng, spare, tokenizer))
    return NeedlePrompt(
        messages=chat,
        answer=facts[0].value,
        gold=corpus.reply(facts[0]),
        key=facts[0].key,
        depth=depths[0],
        prompt_tokens=count_tokens(chat, tokenizer),
    )


def default_records(prompt_tokens: int) -> int:
    """Return the number of records that a prompt of this length holds by default."""
    return max(MIN_RECORDS, min(MAX_RECORDS, prompt_tokens // TOKENS_PER_RECORD))


def render(messages: Sequence[dict[str, str]], tokenizer: ChatTokenizer) -> str:
    """Return the text that is prefilled for these messages."""
    return str(
        tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
    )


def count_tokens(messages: Sequence[dict[str, str]], tokenizer: ChatTokenizer) -> int:
    """Return the prompt length of these messages."""
    return len(tokenizer.encode(render(messages, tokenizer), add_special_tokens=False))


def filler_text(seed: str, tokens: int, tokenizer: ChatTokenizer) -> str:
    """Return prose of `tokens` tokens behind a space, or a few less; one seed is one text."""
    return " ".join(_filler(random.Random(seed), tokens, tokenizer))


def _filler(rng: random.Random, tokens: int, tokenizer: ChatTokenizer) -> list[str]:
    """Return sentences of `tokens` tokens together; the last one is cut short to fit."""
    most = tokens // SHORTEST_SENTENCE_TOKENS + 1
    pool = corpus.filler_pool(rng, max(3, int(most * POOL_SHARE)))
    costs = {text: _cost(text, tokenizer) for text in pool}
    chosen: list[str] = []
    while True:
        text = rng.choice(pool)
        if costs[text] > tokens:
            return chosen + _cut(text, tokens, tokenizer)
        chosen.append(text)
        tokens -= costs[text]


def _cut(text: str, tokens: int, tokenizer: ChatTokenizer) -> list[str]:
    """Return the longest beginning of the sentence that fits; none where nothing does."""
    words = text.rstrip(".").split()
    for count in range(len(words) - 1, 0, -1):
        shorter = " ".join(words[:count]).rstrip(",") + "."
        if _cost(shorter, tokenizer) <= tokens:
            return [shorter]
    return []


def _cost(text: str, tokenizer: ChatTokenizer) -> int:
    return len(tokenizer.encode(f" {text}", add_special_tokens=False))
