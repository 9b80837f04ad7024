"""Tasks over real prose: RULER's needles, hand-written questions, recall, and a tool's result."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import yaml

from . import real_texts, seeded
from .calls import FIND_SCHEMA, found_turn
from .niah import DEPTHS, NEEDLE, NUMBER_DIGITS, ONE, insert_needles
from .task import Conversation, Message, Order, TaskDraft

TURNS = 5
LEAST_WORDS = 64  # longer than any gold
ASK = "{question} Answer in a few words."
TURN = "Here is part {number} of the text.\n\n{text}\n\n{question}"
NUMBER_QUESTION = "What is the special magic number for {key} mentioned in the text so far?"
FIND_NUMBER = "What is the special magic number for {key}? Find it in the text."
FOUND = 4  # numbers in what a search finds
NUMBER_ANSWER = "The special magic number for {key} is {value}."


@dataclass(frozen=True, slots=True)
class Needles:
    """One of `keys` numbers in real prose is asked for."""

    keys: int = 1

    def draft(self, order: Order) -> TaskDraft:
        """Draft needles at random depths of `order.units` sentences."""
        rng = order.rng
        pairs = _pairs(rng, self.keys)
        needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
        haystack = list(_excerpt(rng, order.units))
        places = sorted(len(haystack) * depth // 100 for depth in rng.sample(DEPTHS, self.keys))
        key, value = pairs[0]
        rng.shuffle(needles)
        context = " ".join(insert_needles(haystack, places, needles))
        return TaskDraft(
            messages=(
                {"role": "user", "content": ONE.format(kind="number", context=context, query=key)},
            ),
            references=(value,),
            gold=(f"{key} is: {value}.",),
        )


def tool_result(order: Order) -> TaskDraft:
    """Draft a search whose result, `order.units` sentences with four numbers, ends the prompt."""
    rng = order.rng
    pairs = _pairs(rng, FOUND)
    needles = [NEEDLE.format(kind="numbers", key=key, value=value) for key, value in pairs]
    haystack = list(_excerpt(rng, order.units))
    places = sorted(len(haystack) * depth // 100 for depth in rng.sample(DEPTHS, FOUND))
    key, value = pairs[0]
    rng.shuffle(needles)
    result = " ".join(insert_needles(haystack, places, needles))
    return TaskDraft(
        messages=(
            {"role": "user", "content": FIND_NUMBER.format(key=key)},
            *found_turn("call_0", key, result),
        ),
        references=(value,),
        gold=(f"{key} is: {value}.",),
        tools=(FIND_SCHEMA,),
    )


def questions(order: Order) -> TaskDraft:
    """Draft a question written by hand about `order.units` words around its answer."""
    rng, ring = order.rng, real_texts.licence_words()
    asked, start, length = rng.choice(_answerable())
    first = start - rng.randint(0, max(0, order.units - length))
    units = min(order.units, len(ring))
    context = " ".join(ring[(first + place) % len(ring)] for place in range(units))
    question = ASK.format(question=asked["question"])
    return TaskDraft(
        messages=({"role": "user", "content": f"{context}\n\n{question}"},),
        references=(asked["answer"],),
        gold=(asked["gold"],),
    )


def recall(order: Order) -> TaskDraft:
    """Draft five turns, each with its share of `order.units` sentences; the last asks turn one."""
    rng = order.rng
    pairs = _pairs(rng, TURNS)
    sentences = _excerpt(rng, order.units)
    share = -(-len(sentences) // (TURNS - 1))
    (wanted, value), others = pairs[0], pairs[1:]
    messages: list[Message] = []
    before: list[Conversation] = []
    for turn, (key, number) in enumerate(others):
        facts = (pairs[0], (key, number)) if turn == 0 else ((key, number),)
        needles = tuple(NEEDLE.format(kind="numbers", key=k, value=v) for k, v in facts)
        part = tuple(sentences[turn * share : (turn + 1) * share])
        text = " ".join(seeded.scatter(rng, part, needles))
        question = NUMBER_QUESTION.format(key=key)
        content = TURN.format(number=turn + 1, text=text, question=question)
        messages.append({"role": "user", "content": content})
        before.append(tuple(messages))
        messages.append(
            {"role": "assistant", "content": NUMBER_ANSWER.format(key=key, value=number)}
        )
    messages.append({"role": "user", "content": NUMBER_QUESTION.format(key=wanted)})
    return TaskDraft(
        messages=tuple(messages),
        references=(value,),
        gold=(f"{wanted} is: {value}.",),
        before=tuple(before),
    )


@functools.cache
def all_questions() -> tuple[dict[str, Any], ...]:
    """Return every question of the file: source, question, answer and gold."""
    text = files(__package__).joinpath("questions.yaml").read_text(encoding="utf-8")
    return tuple(yaml.safe_load(text))


@functools.cache
def _answerable() -> tuple[tuple[dict[str, Any], int, int], ...]:
    """Return the questions whose gold this machine has: first word and number of words of it.

    Raises ValueError where there is none.
    """
    text = " ".join(real_texts.licence_words())
    found = []
    for each in all_questions():
        start = text.find(each["gold"])
        if start >= 0:
            first = text.count(" ", 0, start)
            last = text.count(" ", 0, start + len(each["gold"]))
            found.append((each, first, last - first + 1))
    if not found:
        raise ValueError("no question can be answered from the licences of this machine")
    return tuple(found)


def _excerpt(rng: random.Random, count: int) -> tuple[str, ...]:
    """Return `count` consecutive sentences from a random place; the first follows the last."""
    sentences = real_texts.sentences()
    start = rng.randrange(len(sentences))
    return tuple(sentences[(start + place) % len(sentences)] for place in range(count))


def _pairs(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Draw different keys with a number each."""
    keys = seeded.distinct(lambda: seeded.adjective_noun(rng), count)
    return [(key, seeded.number(rng, NUMBER_DIGITS)) for key in keys]
