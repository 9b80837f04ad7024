"""Facts scattered over prose that only count together: a sum of counts, and the newest notice."""

from __future__ import annotations

import random

from ...synthetic import corpus
from . import seeded
from .task import Order, TaskDraft

COUNTS = 6
SUM_QUESTION = "How many crates are there in all the stock counts together? Answer with one number."
REVISIONS = 3
OTHER_KEYS = 4
OVERRIDE_QUESTION = "Later notices replace earlier ones. What is the newest {field} of {key}?"


def scattered_sum(order: Order) -> TaskDraft:
    """Draft six counts in `order.units` sentences; the answer is their sum."""
    rng = order.rng
    things = rng.sample(corpus.THINGS, COUNTS)
    counts = [rng.randrange(11, 100) for _ in things]
    facts = tuple(
        f"Stock count: {count} crates of {thing}."
        for thing, count in zip(things, counts, strict=True)
    )
    document = " ".join(seeded.scatter(rng, seeded.prose(rng, order.units), facts))
    return TaskDraft(
        messages=({"role": "user", "content": f"{document}\n\n{SUM_QUESTION}"},),
        references=(str(sum(counts)),),
        gold=facts,
    )


def override(order: Order) -> TaskDraft:
    """Draft numbered notices, three about each key, in `order.units` sentences; the newest win."""
    rng = order.rng
    subjects = corpus.records(rng, 1 + OTHER_KEYS)
    turns = [subject for subject in subjects for _ in range(REVISIONS)]
    rng.shuffle(turns)
    notices = tuple(_notice(rng, turn, place) for place, turn in enumerate(turns, start=1))
    asked = subjects[0]
    newest = next(text for text in reversed(notices) if f"of {asked.key} is" in text)
    document = " ".join(seeded.scatter(rng, seeded.prose(rng, order.units), notices))
    question = OVERRIDE_QUESTION.format(field=asked.field, key=asked.key)
    return TaskDraft(
        messages=({"role": "user", "content": f"{document}\n\n{question}"},),
        references=(newest[-6:-1],),
        gold=(newest,),
    )


def _notice(rng: random.Random, subject: corpus.Record, place: int) -> str:
    return f"Notice {place}: the {subject.field} of {subject.key} is now {seeded.number(rng, 5)}."
