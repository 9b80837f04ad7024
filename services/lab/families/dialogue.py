"""Questions about earlier parts of a conversation: a secret in the system prompt, a fact."""

from __future__ import annotations

from dataclasses import dataclass

from ...synthetic import corpus
from . import seeded
from .task import Conversation, Message, Order, TaskDraft

TURNS = 5
SYSTEM = "You are a helpful assistant. Session {nonce}. The secret word is {secret}."
SECRET_QUESTION = "What is the secret word?"
WARM_UP = "Hello, how are you?"
NONCE_DIGITS = 8


@dataclass(frozen=True, slots=True)
class SystemSecret:
    """A secret, asked with a cold prefix cache or after a request with the same system prompt."""

    warm: bool

    def draft(self, order: Order) -> TaskDraft:
        """Draft the secret, `order.units` sentences of a user's document, and the question."""
        rng = order.rng
        secret, nonce = seeded.adjective_noun(rng), seeded.number(rng, NONCE_DIGITS)
        system = {"role": "system", "content": SYSTEM.format(nonce=nonce, secret=secret)}
        document = " ".join(seeded.prose(rng, order.units))
        asked = {"role": "user", "content": f"{document}\n\n{SECRET_QUESTION}"}
        greeting = (system, {"role": "user", "content": WARM_UP})
        return TaskDraft(
            messages=(system, asked),
            references=(secret,),
            gold=(f"The secret word is {secret}.",),
            before=(greeting,) if self.warm else (),
            nonce=None if self.warm else nonce,
        )


def recall(order: Order) -> TaskDraft:
    """Draft five turns, each about its share of `order.units` sentences; the last asks turn one.

    The earlier replies are written into the conversation, so that every arm reads the same one.
    """
    rng = order.rng
    records = corpus.records(rng, TURNS)
    sentences = seeded.prose(rng, order.units)
    share = -(-len(sentences) // (TURNS - 1))
    wanted, others = records[0], records[1:]
    messages: list[Message] = []
    before: list[Conversation] = []
    for turn, record in enumerate(others):
        facts = (wanted.text, record.text) if turn == 0 else (record.text,)
        part = sentences[turn * share : (turn + 1) * share]
        document = " ".join(seeded.scatter(rng, part, facts))
        question = f"{document}\n\n{corpus.question(rng, record)}"
        messages.append({"role": "user", "content": question})
        before.append(tuple(messages))
        messages.append({"role": "assistant", "content": corpus.reply(record)})
    messages.append({"role": "user", "content": corpus.question(rng, wanted)})
    return TaskDraft(
        messages=tuple(messages),
        references=(wanted.value,),
        gold=(corpus.reply(wanted),),
        before=tuple(before),
    )
