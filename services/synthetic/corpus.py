"""Generated English-like text: filler prose, and records that give a two-word key a number.

Everything is drawn from a `random.Random`, so one seed is one text. The five digits
follow their key directly: that is what lets models of a few million parameters learn to find it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


KEY_ADJECTIVES = _words(
    """
    amber azure bronze coral crimson ebony golden indigo ivory jade lilac maroon olive pearl
    purple ruby russet saffron scarlet silver teal violet white yellow arctic brave bright calm
    clever cosmic crystal curious distant dusty eager early electric fabled faint fancy fierce
    frozen gentle giant glossy grand happy hidden hollow humble icy jolly keen lively loyal lucky
    lunar mellow mighty misty modest noble northern proud quick quiet rapid rustic sandy secret
    shiny silent sleepy smooth solar southern spotted steady sturdy sunny swift tender thorny tiny
    velvet vivid wild windy wise witty woolly zesty
    """
)
KEY_NOUNS = _words(
    """
    badger beaver bison buffalo camel cheetah cobra condor cougar coyote crane cricket deer
    dolphin donkey dragon eagle falcon ferret finch fox gazelle gecko giraffe goose gopher hawk
    hedgehog heron hornet horse hyena ibis iguana jackal jaguar koala lemur leopard lion lizard
    llama lobster lynx magpie mantis marmot marten mole monkey moose moth newt ocelot octopus
    orca osprey otter owl oyster panda panther parrot pelican penguin pigeon puffin python quail
    rabbit raccoon raven robin salmon seal shark sparrow spider squid stork swallow swan tiger
    toad toucan trout turtle viper walrus weasel whale wolf wombat yak zebra
    """
)
FIELDS = (
    "vault code",
    "gate code",
    "badge number",
    "locker code",
    "parcel number",
    "order number",
    "ticket number",
    "account number",
    "meter reading",
    "serial number",
)
_ADJECTIVES = _words(
    """
    old young narrow wide broken wooden heavy light empty crowded famous local modern ancient
    simple strange useful careful patient gray green blue red black tall short deep warm cold
    fresh dry wet clean rough long small large new good great little public private common rare
    cheap late busy slow strong plain round
    """
)
_PEOPLE = _words(
    """
    teacher farmer doctor sailor baker painter driver writer singer lawyer miner nurse pilot
    tailor mayor clerk guard hunter judge porter scholar soldier student traveler waiter worker
    merchant neighbor stranger child woman man friend captain engineer gardener musician cook
    actor priest
    """
)
THINGS = _words(
    """
    letter basket ladder window table bottle candle blanket hammer lantern mirror needle
    barrel bucket carpet chair clock coat cup drum engine fence flag garment hat jar kettle key
    knife lamp map medal notebook oar paper pencil picture pillow plate pot purse radio ring rope
    saddle sail shelf shoe shovel spoon statue stone stove sword tent toy trumpet umbrella wagon
    wheel whistle book box bread apple cheese
    """
)
PLACES = _words(
    """
    river bridge market harbor village forest mountain valley garden station castle church
    school library museum factory kitchen cellar tower square street corner meadow field lake
    island coast desert road tunnel theater hospital office farm mill barn inn shop bank park
    yard hall palace prison port
    """
)
VERBS = _words(
    """
    carried found sold bought painted repaired moved cleaned lost kept hid brought took left
    saw noticed described measured borrowed returned wanted needed admired ordered opened closed
    counted collected dropped lifted pushed pulled packed shared showed gave traded used watched
    washed
    """
)
_LINKS = _words("near behind beside under above across along around toward inside beyond past")
_TIMES = _words(
    """
    yesterday today later again often twice once usually finally slowly quickly quietly
    carefully together alone everywhere
    """
)
_MOMENTS = _words(
    "morning evening winter summer spring autumn storm harvest dinner lunch festival war"
)

FILLER_WORDS = _ADJECTIVES + _PEOPLE + THINGS + PLACES + VERBS + _LINKS + _TIMES + _MOMENTS
LEXICON = KEY_ADJECTIVES + KEY_NOUNS + FILLER_WORDS


@dataclass(frozen=True, slots=True)
class Record:
    """One fact of a document; `text` is its sentence as the document holds it."""

    key: str  # two words, unique within a document
    field: str
    value: str  # five digits
    text: str


def filler_sentence(rng: random.Random) -> str:
    """Return one sentence of prose without key words or digits."""
    person, thing, place = rng.choice(_PEOPLE), rng.choice(THINGS), rng.choice(PLACES)
    verb, link, adjective = rng.choice(VERBS), rng.choice(_LINKS), rng.choice(_ADJECTIVES)
    other_verb, time = rng.choice(VERBS), rng.choice(_TIMES)
    moment, other_adjective = rng.choice(_MOMENTS), rng.choice(_ADJECTIVES)
    return rng.choice(
        (
            f"The {adjective} {person} {verb} the {thing} {link} the {place}.",
            f"A {person} {verb} a {adjective} {thing} and {other_verb} it {time}.",
            f"After the {moment}, the {person} {verb} every {thing} from the {place}.",
            f"There was a {adjective} {thing} {link} the {place}, and the {person} {verb} it.",
            f"In the {place} a {person} {time} {verb} some {adjective} {thing}.",
            f"When the {person} {verb} the {thing}, it was {adjective}"
            f" and the {place} was {other_adjective}.",
        )
    )


def filler_pool(rng: random.Random, sentences: int) -> tuple[str, ...]:
    """Return the distinct filler sentences of one document, repeated to reach its length."""
    return tuple(filler_sentence(rng) for _ in range(sentences))


def records(rng: random.Random, count: int, *, shared_word_rate: float = 0.5) -> tuple[Record, ...]:
    """Make `count` records with distinct keys; `shared_word_rate` of them share a word."""
    keys: list[tuple[str, str]] = []
    while len(keys) < count:
        key = _key(rng, keys, shared_word_rate)
        if key not in keys:
            keys.append(key)
    rng.shuffle(keys)
    return tuple(_record(rng, f"{adjective} {noun}") for adjective, noun in keys)


def question(rng: random.Random, record: Record) -> str:
    """Return a question that the record answers. It always ends with the key."""
    return rng.choice(
        (
            f"What is the {record.field} of {record.key}?",
            f"Which {record.field} belongs to {record.key}?",
            f"Tell me the {record.field} of {record.key}?",
        )
    )


def reply(record: Record) -> str:
    """Return the answer that the demo models are trained on: the key again, then its value."""
    return f"{record.key} {record.value}"


def join(filler: Sequence[str], facts: Sequence[Record], slots: Sequence[int]) -> str:
    """Return the document with `facts[i]` placed before filler sentence `slots[i]`."""
    before: dict[int, list[str]] = {}
    for fact, slot in zip(facts, slots, strict=True):
        before.setdefault(slot, []).append(fact.text)
    parts: list[str] = []
    for index in range(len(filler) + 1):
        parts.extend(before.get(index, ()))
        parts.extend(filler[index : index + 1])
    return " ".join(parts)


def _key(
    rng: random.Random, taken: Sequence[tuple[str, str]], shared_word_rate: float
) -> tuple[str, str]:
    adjective, noun = rng.choice(KEY_ADJECTIVES), rng.choice(KEY_NOUNS)
    if not taken or rng.random() >= shared_word_rate:
        return adjective, noun
    other = rng.choice(taken)
    return (other[0], noun) if rng.random() < 0.5 else (adjective, other[1])


def _record(rng: random.Random, key: str) -> Record:
    field, value = rng.choice(FIELDS), str(rng.randrange(10000, 100000))
    text = rng.choice(
        (
            f"The {field} of {key} {value}.",
            f"Note: {field} of {key} {value}.",
            f"Log: {field} {key} {value}.",
            f"Record, {field} for {key} {value}.",
        )
    )
    return Record(key=key, field=field, value=value, text=text)
