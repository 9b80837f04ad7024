"""Common and frequent words, as RULER defines them (arXiv 2404.06654, appendix; NVIDIA/RULER).

Aggregation: the answer needs all of the prompt, so no part of it is gold.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from . import seeded
from .task import Order, TaskDraft

COMMON_WORDS = 10
COMMON_TEXT = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list? "
    "Answer: The top 10 words that appear most often in the list are:"
)
CODED_TEXT = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text? "
    "Answer: According to the coded text above, the three most frequently appeared words are:"
)
CODED_LETTERS = 6
CODED_ANSWERS = 3
ZETA_2 = math.pi**2 / 6
NOISE_WORD = "..."


@dataclass(frozen=True, slots=True)
class WordCounts:
    """Occurrences of common and other words, in the list and in the example before it."""

    common: int
    other: int
    example_words: int
    example_common: int
    example_other: int


USUAL = WordCounts(30, 3, example_words=40, example_common=10, example_other=3)
SHORT = WordCounts(6, 1, example_words=20, example_common=3, example_other=1)
SHORT_BELOW_TOKENS = 4096


def common_words(order: Order) -> TaskDraft:
    """Draft a list of ten common and `order.units` other words, after an answered example.

    Words are the project's own, then pseudo-words; the published ones need a download.
    """
    counts = SHORT if order.prompt_tokens < SHORT_BELOW_TOKENS else USUAL
    shown = seeded.vocabulary(order.rng, counts.example_words)
    example = _numbered_list(order.rng, shown, counts.example_common, counts.example_other)
    solved = COMMON_TEXT.format(context=example) + " " + _number_lines(shown[:COMMON_WORDS])
    asked = seeded.vocabulary(order.rng, COMMON_WORDS + order.units)
    context = _numbered_list(order.rng, asked, counts.common, counts.other)
    text = f"{solved}\n{COMMON_TEXT.format(context=context)}"
    return TaskDraft(({"role": "user", "content": text},), references=asked[:COMMON_WORDS])


def frequent_words(order: Order) -> TaskDraft:
    """Draft about `order.units` coded words by Zipf's law, exponent 2; the most frequent are dots.

    The published vocabulary of one word in 50 tokens is longer than what occurs at least once.
    """
    rng = order.rng
    ranks = range(1, 1 + math.isqrt(int(order.units / ZETA_2)))
    counts = [int(order.units * rank**-2 / ZETA_2) for rank in ranks]
    coded = seeded.distinct(
        lambda: seeded.letters(rng, CODED_LETTERS), max(CODED_ANSWERS, len(counts) - 1)
    )
    text = [
        word for word, count in zip((NOISE_WORD, *coded), counts, strict=False)
        for _ in range(count)
    ]  # fmt: skip
    rng.shuffle(text)
    content = CODED_TEXT.format(context=" ".join(text))
    return TaskDraft(({"role": "user", "content": content},), references=coded[:CODED_ANSWERS])


LEAST_CODED_WORDS = 27  # so that the fourth rank occurs


def _numbered_list(rng: random.Random, vocabulary: Sequence[str], common: int, other: int) -> str:
    listed = [*vocabulary[:COMMON_WORDS]] * common + [*vocabulary[COMMON_WORDS:]] * other
    rng.shuffle(listed)
    return _number_lines(listed)


def _number_lines(listed: Sequence[str]) -> str:
    return " ".join(f"{place}. {word}" for place, word in enumerate(listed, start=1))
