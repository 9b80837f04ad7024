"""Passage count, as LongBench asks it (arXiv 2308.14508), over generated paragraphs.

Aggregation: the answer needs all of the prompt, so no part of it is gold.
"""

from __future__ import annotations

from . import seeded
from .task import Order, TaskDraft

SENTENCES = 5
TEXT = (
    "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. "
    "Please carefully read these paragraphs and determine how many unique paragraphs there are "
    "after removing duplicates. In other words, how many non-repeating paragraphs are there in "
    "total?\n\n{context}\n\nPlease enter the final count of unique paragraphs after removing "
    "duplicates. The output format should only contain the number, such as 1, 2, 3, and so on."
    "\n\nThe final answer is: "
)


def passage_count(order: Order) -> TaskDraft:
    """Draft `order.units` paragraphs, at least half of them different from every other."""
    rng = order.rng
    unique = rng.randint(-(-order.units // 2), order.units)
    different = seeded.distinct(lambda: " ".join(seeded.prose(rng, SENTENCES)), unique)
    shown = [*different, *rng.choices(different, k=order.units - unique)]
    rng.shuffle(shown)
    context = "\n\n".join(f"Paragraph {i}: {text}" for i, text in enumerate(shown, start=1))
    return TaskDraft(
        messages=({"role": "user", "content": TEXT.format(context=context)},),
        references=(str(unique),),
    )
