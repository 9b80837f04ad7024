"""Seeded words, numbers and prose, in place of published generators' word lists and essays.

They come from the project's own word lists, so that no download is needed and models of a few
million parameters know them.
"""

from __future__ import annotations

import random
import string
import uuid
from collections.abc import Callable

from ...synthetic import corpus

_ONSETS = ("b", "br", "d", "dr", "f", "g", "gl", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t")
_VOWELS = ("a", "e", "i", "o", "u")
_CODAS = ("l", "m", "n", "r", "s", "t")


def number(rng: random.Random, digits: int) -> str:
    """Draw a number of `digits` digits that does not start with 0."""
    return str(rng.randrange(10 ** (digits - 1), 10**digits))


def adjective_noun(rng: random.Random) -> str:
    """Draw two words with a hyphen."""
    return f"{rng.choice(corpus.KEY_ADJECTIVES)}-{rng.choice(corpus.KEY_NOUNS)}"


def uuid4(rng: random.Random) -> str:
    """Draw a version 4 UUID from the generator's bits."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def letters(rng: random.Random, count: int, alphabet: str = string.ascii_lowercase) -> str:
    """Draw `count` independent letters."""
    return "".join(rng.choices(alphabet, k=count))


def distinct(draw: Callable[[], str], count: int) -> tuple[str, ...]:
    """Return `count` different values of `draw`, in the order they came."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[draw()] = None
    return tuple(found)


def vocabulary(rng: random.Random, count: int) -> tuple[str, ...]:
    """Return `count` different words: the project's own, then pseudo-words of 2 or 3 syllables."""
    known = sorted({*corpus.LEXICON})
    rng.shuffle(known)
    if count <= len(known):
        return tuple(known[:count])
    taken = {*known}

    def unknown() -> str:
        while (word := _pseudo_word(rng)) in taken:
            pass
        return word

    return (*known, *distinct(unknown, count - len(known)))


def prose(rng: random.Random, sentences: int) -> tuple[str, ...]:
    """Draw sentences in place of an essay's: no key word and no digit in them."""
    return tuple(corpus.filler_sentence(rng) for _ in range(sentences))


def scatter(rng: random.Random, haystack: tuple[str, ...], facts: tuple[str, ...]) -> list[str]:
    """Return the haystack with `facts`, in their order, at random places."""
    places = sorted(rng.randint(0, len(haystack)) for _ in facts)
    mixed = list(haystack)
    for place, fact in reversed(list(zip(places, facts, strict=True))):
        mixed.insert(place, fact)
    return mixed


def _pseudo_word(rng: random.Random) -> str:
    syllables = (rng.choice(_ONSETS) + rng.choice(_VOWELS) for _ in range(rng.choice((2, 2, 3))))
    return "".join(syllables) + rng.choice(_CODAS)
