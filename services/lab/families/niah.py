"""Needles in a haystack, as RULER defines them (arXiv 2404.06654, appendix; NVIDIA/RULER).

Sentences, numbers, depths and joins are the published ones. Keys come from the project's own
adjectives and nouns and never repeat within a prompt; the essay is generated prose. The chat is
one user turn that ends with the published beginning of the answer.
"""

from __future__ import annotations

import enum
import random
from dataclasses import dataclass

from . import seeded
from .task import Order, TaskDraft

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
MANY = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text are"
)
ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text? "
    "The special magic {kind} for {query} mentioned in the provided text is"
)
DEPTHS = tuple(round(100 * step / 39) for step in range(40))  # percent
NUMBER_DIGITS = 7


class Haystack(enum.Enum):
    """The text that hides the needles."""

    NOISE = enum.auto()
    ESSAY = enum.auto()
    NEEDLES = enum.auto()  # of keys that nobody asks for


class Kind(enum.StrEnum):
    """The kind of a key or a value; the plural that the sentences use."""

    WORDS = "words"
    NUMBERS = "numbers"
    UUIDS = "uuids"


@dataclass(frozen=True, slots=True)
class Niah:
    """One variant: `keys` needles' keys with `values` values each, of which `queries` are asked."""

    haystack: Haystack
    key_kind: Kind = Kind.WORDS
    value_kind: Kind = Kind.NUMBERS
    keys: int = 1
    values: int = 1
    queries: int = 1

    def draft(self, order: Order) -> TaskDraft:
        """Draft needles at random depths of `order.units` sentences, lines or other needles."""
        rng = order.rng
        others = order.units if self.haystack is Haystack.NEEDLES else 0
        keys = seeded.distinct(lambda: draw_word(rng, self.key_kind), self.keys + others)
        pairs = [
            (key, tuple(draw_word(rng, self.value_kind) for _ in range(self.values)))
            for key in keys[: self.keys]
        ]
        asked = rng.sample(pairs, self.queries)
        needles = [self._needle(key, value) for key, values in pairs for value in values]
        rng.shuffle(needles)
        context = self._context(order, needles, keys[self.keys :])
        return TaskDraft(
            messages=({"role": "user", "content": self._text(context, [key for key, _ in asked])},),
            references=tuple(value for _, values in asked for value in values),
            gold=tuple(f"{key} is: {value}." for key, values in asked for value in values),
        )

    @property
    def needles(self) -> int:
        return self.keys * self.values

    def _needle(self, key: str, value: str) -> str:
        return NEEDLE.format(kind=self.value_kind, key=key, value=value)

    def _context(self, order: Order, needles: list[str], others: tuple[str, ...]) -> str:
        rng = order.rng
        if self.haystack is Haystack.ESSAY:
            sentences = list(seeded.prose(rng, order.units))
            places = sorted(
                len(sentences) * depth // 100 for depth in rng.sample(DEPTHS, len(needles))
            )
            return " ".join(insert_needles(sentences, places, needles))
        lines = [NOISE] * order.units
        if self.haystack is Haystack.NEEDLES:
            lines = [self._needle(key, draw_word(rng, self.value_kind)) for key in others]
        places = sorted(rng.sample(range(order.units), len(needles)))
        return "\n".join(insert_needles(lines, places, needles))

    def _text(self, context: str, asked: list[str]) -> str:
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        if self.queries * self.values > 1:
            return MANY.format(kind=self.value_kind, context=context, query=query)
        return ONE.format(kind=self.value_kind.removesuffix("s"), context=context, query=query)


def draw_word(rng: random.Random, kind: Kind) -> str:
    """Draw one key or value."""
    if kind is Kind.NUMBERS:
        return seeded.number(rng, NUMBER_DIGITS)
    if kind is Kind.UUIDS:
        return seeded.uuid4(rng)
    return seeded.adjective_noun(rng)


def insert_needles(lines: list[str], places: list[int], needles: list[str]) -> list[str]:
    """Insert each needle before the line that its place counts; places ascend."""
    mixed = list(lines)
    for place, needle in reversed(list(zip(places, needles, strict=True))):
        mixed.insert(place, needle)
    return mixed
