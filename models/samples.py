"""Training samples: a chat about a generated document, several questions each, some with gaps."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from specprefill.synthetic import corpus

SYSTEM_TEXTS = (
    "You are a helpful assistant.",
    "Answer the question with the text.",
    "You are a careful clerk. Use the records above.",
    "You answer questions about a long document.",
    "Be brief.",
    "Repeat the key and give its value.",
)
DOCUMENT_IN_SYSTEM_SHARE, NO_SYSTEM_SHARE = 0.1, 0.2
SEPARATORS = ("\n\n", "\n\n", "\n", " ")  # between document and question
# About how long things are, in tokens.
QUESTION_AND_ANSWER, RECORD, SENTENCE, TEMPLATE = 21, 11, 12, 12
TOKENS_PER_QUESTION, MAX_QUESTIONS = 48, 16
TOKENS_PER_RECORD, MAX_RECORDS = 40, 48
TOKENS_PER_DRILLED_KEY = 24
KEY_WORDS, VALUE_DIGITS = 2, 5
GAP_CHUNK_TOKENS = 32
LAST_QUESTION_TOKENS = 16
PLAIN, ANSWER, VALUE = 1, 2, 3  # what a token is to the loss; 0 is padding


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids, the position of each, and the kind of each."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    kinds: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Chat:
    """A generated conversation before it is tokenized."""

    messages: list[dict[str, str]]
    asked: tuple[corpus.Record, ...]


@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes samples in one tokenizer's chat format."""

    tokenizer: PreTrainedTokenizerBase

    def dense(self, rng: random.Random, tokens: int) -> Sample:
        """A chat of about `tokens` tokens."""
        return self._sample(self._render(make_chat(rng, tokens)))

    def pruned(self, rng: random.Random, tokens: int, keep: float) -> Sample:
        """A chat of which only some chunks are left, at their own positions.

        Chunks with an asked record and those from the first question on are left, as a good
        speculator would do, and about `keep` of the others.
        """
        chat = make_chat(rng, tokens)
        text = self._render(chat)
        whole = self._sample(text)
        needed = self._record_chunks(text, chat.asked) | _conversation_chunks(whole)
        chunks = range(-(-len(whole.ids) // GAP_CHUNK_TOKENS))
        kept = {chunk for chunk in chunks if chunk in needed or rng.random() < keep}
        left = [i for i in whole.positions if i // GAP_CHUNK_TOKENS in kept]
        return Sample(
            ids=tuple(whole.ids[i] for i in left),
            positions=tuple(left),
            kinds=tuple(whole.kinds[i] for i in left),
        )

    def drill(self, rng: random.Random, tokens: int) -> Sample:
        """Bare keys with values among filler, then all of them again: the task at its densest."""
        facts = corpus.records(rng, max(2, tokens // TOKENS_PER_DRILLED_KEY), shared_word_rate=0.2)
        pairs = [self._encode(f" {corpus.reply(fact)}.") for fact in facts]
        room = tokens - 2 * sum(map(len, pairs))
        parts = [self._encode(f" {text}") for text in draw_filler(rng, max(0, room) // SENTENCE)]
        parts += pairs
        rng.shuffle(parts)
        ids = [*self._encode("<|begin|><|user|>"), *(token for part in parts for token in part)]
        ids += self._encode("<|assistant|>")
        kinds = [PLAIN] * len(ids)
        for pair in rng.sample(pairs, len(pairs)):
            ids += pair
            kinds += [PLAIN] * KEY_WORDS + [VALUE] * VALUE_DIGITS + [PLAIN]
        return Sample(tuple(ids), tuple(range(len(ids))), tuple(kinds))

    def _render(self, chat: Chat) -> str:
        return str(self.tokenizer.apply_chat_template(chat.messages, tokenize=False))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _sample(self, text: str) -> Sample:
        ids = self._encode(text)
        start, end = self.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
        kinds = tuple(_kinds(ids, start, end))
        return Sample(tuple(ids), tuple(range(len(ids))), kinds)

    def _record_chunks(self, text: str, facts: tuple[corpus.Record, ...]) -> set[int]:
        encoding = self.tokenizer(text, add_special_tokens=False)
        chunks: set[int] = set()
        for fact in facts:
            start = text.index(fact.text)
            first, last = (
                encoding.char_to_token(char) for char in (start, start + len(fact.text) - 1)
            )
            chunks.update(range(first // GAP_CHUNK_TOKENS, last // GAP_CHUNK_TOKENS + 1))
        return chunks


def make_chat(rng: random.Random, tokens: int) -> Chat:
    """A conversation of about `tokens` tokens: a document, then questions with their answers."""
    questions = max(1, min(MAX_QUESTIONS, tokens // TOKENS_PER_QUESTION))
    most = max(2, min(MAX_RECORDS, tokens // TOKENS_PER_RECORD))
    count = max(questions, rng.randint(2, most))
    room = tokens - TEMPLATE - questions * QUESTION_AND_ANSWER - count * RECORD
    facts = corpus.records(rng, count)
    filler = draw_filler(rng, max(0, room) // SENTENCE)
    slots = [rng.randint(0, len(filler)) for _ in facts]
    asked = tuple(rng.sample(facts, questions))
    return Chat(_messages(rng, corpus.join(filler, facts, slots), asked), asked)


def draw_filler(rng: random.Random, sentences: int) -> list[str]:
    """Sentences drawn from a smaller pool: the repeats reward a model that learns to copy."""
    pool = corpus.filler_pool(rng, max(3, int(sentences * rng.uniform(0.2, 1.0))))
    return [rng.choice(pool) for _ in range(sentences)]


def _messages(
    rng: random.Random, document: str, asked: tuple[corpus.Record, ...]
) -> list[dict[str, str]]:
    questions = [corpus.question(rng, fact) for fact in asked]
    place = rng.random()
    system = rng.choice(SYSTEM_TEXTS) if place >= NO_SYSTEM_SHARE else None
    if place < DOCUMENT_IN_SYSTEM_SHARE:
        system = document
    else:
        questions[0] = f"{document}{rng.choice(SEPARATORS)}{questions[0]}"
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text, fact in zip(questions, asked, strict=True):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": corpus.reply(fact)})
    return messages


def _kinds(ids: list[int], start: int, end: int) -> Iterator[int]:
    """Answers are what stands after a start token, up to and with the end token."""
    place: int | None = None  # within an answer
    for token in ids:
        if place is None:
            yield PLAIN
            place = 0 if token == start else None
            continue
        yield VALUE if KEY_WORDS <= place < KEY_WORDS + VALUE_DIGITS else ANSWER
        place = None if token == end else place + 1


def _conversation_chunks(sample: Sample) -> set[int]:
    """From the first question on."""
    question = sample.kinds.index(ANSWER) - LAST_QUESTION_TOKENS
    chunks = [i // GAP_CHUNK_TOKENS for i in sample.positions]
    return {chunk for chunk in chunks if chunk >= question // GAP_CHUNK_TOKENS}
