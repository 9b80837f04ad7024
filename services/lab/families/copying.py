"""Verbatim copy: quote the lines under one comment of a long generated program."""

from __future__ import annotations

import random

from ...synthetic import corpus
from . import seeded
from .task import Order, TaskDraft

BLOCK_LINES, SHORT_BLOCK_LINES = 20, 8
SHORT_BELOW_TOKENS = 2048
QUESTION = 'Quote the {lines} lines under the comment "# {key}" exactly as they are, nothing else.'


def copy_lines(order: Order) -> TaskDraft:
    """Draft a program of `order.units` lines in blocks, each under a comment; no line recurs."""
    rng = order.rng
    size = SHORT_BLOCK_LINES if order.prompt_tokens < SHORT_BELOW_TOKENS else BLOCK_LINES
    blocks = max(1, order.units // size)
    keys = seeded.distinct(
        lambda: f"{rng.choice(corpus.KEY_ADJECTIVES)} {rng.choice(corpus.KEY_NOUNS)}", blocks + 1
    )
    place = rng.randrange(blocks)
    lines = seeded.distinct(lambda: _line(rng), max(size, order.units))
    wanted = lines[place * size : (place + 1) * size]
    program = "\n".join(
        f"# {key}\n" + "\n".join(block)
        for index, key in enumerate(keys)
        if (block := lines[index * size : (index + 1) * size])
    )
    question = QUESTION.format(lines=size, key=keys[place])
    return TaskDraft(
        messages=({"role": "user", "content": f"{program}\n\n{question}"},),
        references=("\n".join(wanted),),
        gold=wanted,
    )


def _line(rng: random.Random) -> str:
    thing, verb, place = (rng.choice(kind) for kind in (corpus.THINGS, corpus.VERBS, corpus.PLACES))
    return f"{thing} = {verb} ( {place} , {seeded.number(rng, 3)} ) ;"
