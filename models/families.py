"""Training conversations of the quality suite's families, worded as its prompts are.

What a small model learns is copying, so every reply is a path that copying can follow: it has the
key before the value, and a chain of variables backwards, each name beside the next. Where it can,
a conversation asks several questions about one document.
"""

from __future__ import annotations

import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from specprefill.lab.families import (
    copying,
    dialogue,
    lookup,
    niah,
    notices,
    tracking,
    words,
)
from specprefill.lab.families.task import Order, TaskDraft
from specprefill.synthetic import corpus

# About how long things are, in tokens.
NOISE, SENTENCE, NOTICE, CODE_LINE, PAIR = 26, 12, 17, 13, 35
NUMBER_NEEDLE, UUID_NEEDLE, UUID_PAIR_NEEDLE = 15, 28, 42
MAX_QUESTIONS = 8


@dataclass(frozen=True, slots=True)
class Turn:
    """A user's message, the reply, and the text that must be read for it."""

    text: str
    reply: str
    gold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns after one another; the first one holds the document unless the system prompt does."""

    turns: tuple[Turn, ...]
    system: str | None = None


Family = Callable[[random.Random, int], Conversation]
Draw = Callable[[random.Random], str]


def draw(rng: random.Random, tokens: int) -> Conversation:
    """Draw a conversation of any family, of about `tokens` tokens."""
    family = rng.choices(list(WEIGHTS), weights=list(WEIGHTS.values()))[0]
    return family(rng, tokens)


def magic_needles(rng: random.Random, tokens: int) -> Conversation:
    """Draw needles in noise, in prose, or among needles, each with a key of its own."""
    key_kind, kind, size = rng.choice(NEEDLE_KINDS)
    among_needles = rng.random() < 0.5
    asked = max(1, min(MAX_QUESTIONS, tokens // (4 * size)))
    most = max(asked, tokens // size - asked * 3)
    count = most if among_needles else min(most, rng.randint(asked, 2 * asked))
    keys = words.distinct(lambda: niah.draw_word(rng, key_kind), count)
    facts = [f"{key} is: {niah.draw_word(rng, kind)}." for key in keys]
    room = 0 if among_needles else tokens - (count + asked * 3) * size
    turns = [_magic_turn(kind, (key,), (fact,)) for key, fact in zip(keys, facts, strict=True)]
    return _magic_conversation(rng, niah.ONE, kind, rng.sample(turns, asked), facts, room)


def magic_values(rng: random.Random, tokens: int) -> Conversation:
    """Draw one to four values of each key, all of them asked, in the text's order."""
    kind, asked = niah.Kind.NUMBERS, max(1, min(4, tokens // 200))
    keys = words.distinct(lambda: words.adjective_noun(rng), asked)
    counted = [key for key in keys for _ in range(rng.choice((2, 4, 4)))]
    rng.shuffle(counted)
    facts = [f"{key} is: {niah.draw_word(rng, kind)}." for key in counted]
    turns = [
        _magic_turn(kind, (key,), [fact for fact in facts if fact.startswith(f"{key} ")])
        for key in keys
    ]
    room = tokens - len(facts) * 2 * NUMBER_NEEDLE - asked * 40
    return _magic_conversation(rng, niah.MANY, kind, turns, facts, room)


def magic_keys(rng: random.Random, tokens: int) -> Conversation:
    """Draw several keys asked at once, in the question's order."""
    kind, questions = niah.Kind.NUMBERS, max(1, min(4, tokens // 200))
    keys = words.distinct(lambda: words.adjective_noun(rng), max(4, min(12, tokens // 60)))
    values = {key: f"{key} is: {niah.draw_word(rng, kind)}." for key in keys}
    turns = []
    for _ in range(questions):
        asked = rng.sample(keys, rng.choice((2, 3, 4, 4)))
        turns.append(_magic_turn(kind, asked, [values[key] for key in asked]))
    room = tokens - len(keys) * NUMBER_NEEDLE - questions * 90
    return _magic_conversation(rng, niah.MANY, kind, turns, list(values.values()), room)


def variables(rng: random.Random, tokens: int) -> Conversation:
    """Draw the chain backwards, as the text has it: each name's own line leads to the next."""
    draft = _draft(tracking.variable_tracking, rng, max(6, (tokens - 170) // NOISE), tokens)
    return _asked_once(draft, " = VAR ".join(reversed(draft.references)))


def key_value_pairs(rng: random.Random, tokens: int) -> Conversation:
    """Draw values of keys in a JSON object."""
    asked = max(1, min(MAX_QUESTIONS, tokens // (4 * PAIR)))
    count = max(asked, 2, tokens // PAIR - 1 - asked * 2)
    items = [f'"{words.uuid4(rng)}": "{words.uuid4(rng)}"' for _ in range(count)]
    turns = []
    for item in rng.sample(items, asked):
        query = lookup.QUERY.format(key=item[1:37])
        turns.append(Turn(f"{query}{lookup.ANSWER}", item, (item,)))
    query_first = lookup.QUERY.format(key=turns[0].gold[0][1:37]) + "\n"
    head = lookup.TASK + (query_first if rng.random() < 0.2 else "")
    return _with_document(head + lookup.DATA.format(data="{" + ",\n ".join(items) + "}"), turns)


def newest_notice(rng: random.Random, tokens: int) -> Conversation:
    """Draw numbered notices, several about each key; the newest one holds."""
    subjects = corpus.records(rng, max(2, min(5, tokens // 60)))
    revised = [subject for subject in subjects for _ in range(rng.choice((1, 2, 3)))]
    rng.shuffle(revised)
    facts = [
        f"Notice {place}: the {subject.field} of {subject.key} is now {words.number(rng, 5)}."
        for place, subject in enumerate(revised, start=1)
    ]
    room = tokens - NOTICE * len(facts) - 35 * len(subjects)
    document = " ".join(_scatter(rng, _prose(rng, room), facts))
    return _with_document(f"{document}\n\n", [_newest_turn(each, facts) for each in subjects])


def quote_lines(rng: random.Random, tokens: int) -> Conversation:
    """Draw the lines under a comment, after the comment itself."""
    short = tokens < copying.SHORT_BELOW_TOKENS
    size = copying.SHORT_BLOCK_LINES if short else copying.BLOCK_LINES
    lines = max(size, tokens // CODE_LINE - size)
    draft = _draft(copying.copy_lines, rng, lines, tokens)
    comment = draft.messages[0]["content"].rsplit('"', 2)[1]
    return _asked_once(draft, f"{comment}\n{draft.references[0]}")


def system_secret(rng: random.Random, tokens: int) -> Conversation:
    """Draw a word of the system prompt."""
    sentences = max(1, (tokens - 50) // SENTENCE)
    draft = _draft(dialogue.SystemSecret(warm=False).draft, rng, sentences, tokens)
    system, user = (str(message["content"]) for message in draft.messages)
    return Conversation((Turn(user, draft.gold[0], draft.gold),), system)


def recall_turn(rng: random.Random, tokens: int) -> Conversation:
    """Draw turns that each bring a part of the document; the last asks about the first."""
    sentences = max(dialogue.TURNS, (tokens - 250) // SENTENCE)
    draft = _draft(dialogue.recall, rng, sentences, tokens)
    texts = [str(message["content"]) for message in draft.messages] + [draft.gold[0]]
    replies = texts[1::2]
    return Conversation(
        tuple(Turn(text, reply, (reply,)) for text, reply in zip(texts[::2], replies, strict=True))
    )


def drill_facts(rng: random.Random, tokens: int) -> list[tuple[str, str]]:
    """Draw keys with what follows them; twice all of them take most of the tokens."""
    draw_key, between, draw_value, size = rng.choice(DRILLS)
    count = max(2, tokens // (2 * size + SENTENCE))
    keys = words.distinct(lambda: draw_key(rng), count)
    return [(f" {key}", f"{between}{draw_value(rng)}") for key in keys]


WEIGHTS: dict[Family, float] = {
    magic_needles: 0.35,
    key_value_pairs: 0.2,
    variables: 0.08,
    magic_values: 0.1,
    magic_keys: 0.06,
    newest_notice: 0.13,
    quote_lines: 0.05,
    system_secret: 0.01,
    recall_turn: 0.02,
}
NEEDLE_KINDS = (
    *((niah.Kind.WORDS, niah.Kind.NUMBERS, NUMBER_NEEDLE),) * 3,
    (niah.Kind.WORDS, niah.Kind.UUIDS, UUID_NEEDLE),
    *((niah.Kind.UUIDS, niah.Kind.UUIDS, UUID_PAIR_NEEDLE),) * 2,
)
# How a key is drawn, what stands between it and its value, how that is drawn, tokens of all.
DRILLS: tuple[tuple[Draw, str, Draw, int], ...] = (
    (lambda rng: _words(rng, " "), " ", lambda rng: words.number(rng, 5), 8),
    *((lambda rng: _words(rng, "-"), " is: ", lambda rng: words.number(rng, 7), 8),) * 4,
    (lambda rng: _words(rng, "-"), " is: ", words.uuid4, 20),
    (words.uuid4, " is: ", words.uuid4, 35),
    (lambda rng: f'"{words.uuid4(rng)}', '": "', words.uuid4, 35),
    (lambda rng: _name(rng), " = VAR ", lambda rng: _name(rng), 13),
)


def _words(rng: random.Random, between: str) -> str:
    return f"{rng.choice(corpus.KEY_ADJECTIVES)}{between}{rng.choice(corpus.KEY_NOUNS)}"


def _name(rng: random.Random) -> str:
    return words.letters(rng, tracking.NAME_LETTERS, string.ascii_uppercase)


def _magic_turn(kind: niah.Kind, keys: Sequence[str], facts: Sequence[str]) -> Turn:
    """Return the question, with the beginning of an answer that the published prompts end with."""
    template = niah.MANY if len(facts) > 1 else niah.ONE
    query = ", ".join(keys[:-1]) + ", and " + keys[-1] if len(keys) > 1 else keys[0]
    shown = kind if len(facts) > 1 else kind.removesuffix("s")
    question = template.split("{context}\n")[1].format(kind=shown, query=query)
    return Turn(question, ", ".join(fact.removesuffix(".") for fact in facts), tuple(facts))


def _magic_conversation(
    rng: random.Random,
    template: str,
    kind: niah.Kind,
    turns: Sequence[Turn],
    facts: Sequence[str],
    room: int,
) -> Conversation:
    needles = [f"One of the special magic {kind} for {fact}" for fact in facts]
    noise = rng.random() < 0.5
    haystack = (niah.NOISE,) * max(0, room // NOISE) if noise else _prose(rng, room)
    shown = kind.removesuffix("s") if template == niah.ONE else kind
    head = template.split("{context}")[0].format(kind=shown)
    context = ("\n" if noise else " ").join(_scatter(rng, haystack, needles))
    return _with_document(f"{head}{context}\n", turns)


def _newest_turn(subject: corpus.Record, facts: Sequence[str]) -> Turn:
    gold = next(fact for fact in reversed(facts) if f"of {subject.key} is" in fact)
    question = notices.OVERRIDE_QUESTION.format(field=subject.field, key=subject.key)
    return Turn(question, gold[gold.index(subject.key) :].removesuffix("."), (gold,))


def _draft(
    family: Callable[[Order], TaskDraft], rng: random.Random, units: int, tokens: int
) -> TaskDraft:
    return family(Order(rng, units, tokens))


def _asked_once(draft: TaskDraft, reply: str) -> Conversation:
    return Conversation((Turn(str(draft.messages[0]["content"]), reply, draft.gold),))


def _with_document(document: str, turns: Sequence[Turn]) -> Conversation:
    first = Turn(document + turns[0].text, turns[0].reply, turns[0].gold)
    return Conversation((first, *turns[1:]))


def _prose(rng: random.Random, tokens: int) -> tuple[str, ...]:
    return words.prose(rng, max(0, tokens // SENTENCE))


def _scatter(rng: random.Random, haystack: Sequence[str], facts: Sequence[str]) -> list[str]:
    return words.scatter(rng, tuple(haystack), tuple(facts))
