"""Training samples: a chat about a generated document, several questions each, some with gaps."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import families
from transformers import BatchEncoding, PreTrainedTokenizerBase

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
SUITE_SYSTEM_SHARE = 0.3
# About how long things are, in tokens.
QUESTION_AND_ANSWER, RECORD, SENTENCE, TEMPLATE = 21, 11, 12, 12
TOKENS_PER_QUESTION, MAX_QUESTIONS = 48, 16
TOKENS_PER_RECORD, MAX_RECORDS = 40, 48
KEY_TOKENS = 3  # after this many it is known which key is drilled
RECORDS_SHARE = 0.25  # of the chats; the others are of the quality suite's families
QUERIES = 8  # of each answer, from its start token on, are to find the gold
GAP_CHUNK_TOKENS, MAX_GAPS = 32, 8
LAST_QUESTION_TOKENS = 16
PLAIN, ANSWER = 1, 2  # what a token is to the loss; 0 is padding


@dataclass(frozen=True, slots=True)
class AttentionTarget:
    """The tokens that one answer needs, and the tokens to look at them: indices of a sample."""

    queries: range  # the first stands before the answer's first token
    gold: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """Token ids, the position of each, the kind of each, and the findings of the answers."""

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    kinds: tuple[int, ...]
    findings: tuple[AttentionTarget, ...] = ()


@dataclass(frozen=True, slots=True)
class Chat:
    """A generated conversation before it is tokenized."""

    messages: list[dict[str, str]]
    golds: tuple[tuple[str, ...], ...]  # of each reply: what stands in the text and it needs


@dataclass(frozen=True, slots=True)
class Sampler:
    """Makes samples in one tokenizer's chat format."""

    tokenizer: PreTrainedTokenizerBase

    def make_dense(self, rng: random.Random, tokens: int) -> TrainingSample:
        """Make a chat of about `tokens` tokens."""
        return self._sample(draw_chat(rng, tokens))

    def make_pruned(self, rng: random.Random, tokens: int, keep: float) -> TrainingSample:
        """Make a chat with only some chunks left, at their own positions.

        Chunks that an answer needs and those from the first question on are left, as a good
        speculator would do, and about `keep` of the others.
        """
        whole = self._sample(draw_chat(rng, tokens))
        needed = _gold_chunks(whole) | _conversation_chunks(whole)
        chunks = range(-(-len(whole.ids) // GAP_CHUNK_TOKENS))
        kept = {chunk for chunk in chunks if chunk in needed or rng.random() < keep}
        left = [i for i in whole.positions if i // GAP_CHUNK_TOKENS in kept]
        return _keep_tokens(whole, left)

    def make_drill(self, rng: random.Random, tokens: int) -> TrainingSample:
        """Make bare keys with values among filler, then all of them again: the densest task."""
        facts = families.drill_facts(rng, tokens)
        pairs = [(self._encode(key), self._encode(f"{key}{value}.")) for key, value in facts]
        room = tokens - 2 * sum(len(pair) for _, pair in pairs)
        parts = [self._encode(f" {text}") for text in draw_filler(rng, max(0, room) // SENTENCE)]
        parts += [pair for _, pair in pairs]
        rng.shuffle(parts)
        ids = [*self._encode("<|begin|><|user|>"), *(token for part in parts for token in part)]
        ids += self._encode("<|assistant|>")
        kinds = [PLAIN] * len(ids)
        for key, pair in rng.sample(pairs, len(pairs)):
            unknown = min(len(key), KEY_TOKENS)
            ids += pair
            kinds += [PLAIN] * unknown + [ANSWER] * (len(pair) - unknown - 1) + [PLAIN]
        return TrainingSample(tuple(ids), tuple(range(len(ids))), tuple(kinds))

    def _render(self, chat: Chat) -> str:
        return str(self.tokenizer.apply_chat_template(chat.messages, tokenize=False))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _sample(self, chat: Chat) -> TrainingSample:
        text = self._render(chat)
        encoding = self.tokenizer(text, add_special_tokens=False)
        ids = encoding["input_ids"]
        start, end = self.tokenizer.convert_tokens_to_ids(["<|assistant|>", "<|end|>"])
        starts = [place for place, token in enumerate(ids) if token == start]
        findings = tuple(
            AttentionTarget(
                range(first, min(first + QUERIES, ids.index(end, first))),
                tuple(_tokens_of(encoding, text, gold)),
            )
            for first, gold in zip(starts, chat.golds, strict=True)
        )
        kinds = tuple(_kinds(ids, start, end))
        return TrainingSample(tuple(ids), tuple(range(len(ids))), kinds, findings)


def draw_chat(rng: random.Random, tokens: int) -> Chat:
    """Draw a chat of about `tokens` tokens about records, or of one of the suite's families."""
    if rng.random() < RECORDS_SHARE:
        return make_chat(rng, tokens)
    conversation = families.draw(rng, tokens - TEMPLATE)
    system = conversation.system
    if system is None and rng.random() < SUITE_SYSTEM_SHARE:
        system = rng.choice(SYSTEM_TEXTS)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for turn in conversation.turns:
        messages.append({"role": "user", "content": turn.text})
        messages.append({"role": "assistant", "content": turn.reply})
    return Chat(messages, tuple(turn.gold for turn in conversation.turns))


def make_chat(rng: random.Random, tokens: int) -> Chat:
    """Make a chat of about `tokens` tokens: a document, then questions with their answers."""
    asked_count = max(1, min(MAX_QUESTIONS, tokens // TOKENS_PER_QUESTION))
    most = max(2, min(MAX_RECORDS, tokens // TOKENS_PER_RECORD))
    count = max(asked_count, rng.randint(2, most))
    room = tokens - TEMPLATE - asked_count * QUESTION_AND_ANSWER - count * RECORD
    facts = corpus.records(rng, count)
    filler = draw_filler(rng, max(0, room) // SENTENCE)
    slots = [rng.randint(0, len(filler)) for _ in facts]
    asked = rng.sample(facts, asked_count)
    questions = [corpus.question(rng, fact) for fact in asked]
    replies = [corpus.reply(fact) for fact in asked]
    messages = _messages(rng, corpus.join(filler, facts, slots), questions, replies)
    return Chat(messages, tuple((fact.text,) for fact in asked))


def draw_filler(rng: random.Random, sentences: int) -> list[str]:
    """Draw sentences from a smaller pool: the repeats reward a model that learns to copy."""
    pool = corpus.filler_pool(rng, max(3, int(sentences * rng.uniform(0.2, 1.0))))
    return [rng.choice(pool) for _ in range(sentences)]


def _messages(
    rng: random.Random,
    document: str,
    questions: Sequence[str],
    replies: Sequence[str],
) -> list[dict[str, str]]:
    first, *others = questions
    place = rng.random()
    system = rng.choice(SYSTEM_TEXTS) if place >= NO_SYSTEM_SHARE else None
    if place < DOCUMENT_IN_SYSTEM_SHARE:
        system = document
    else:
        first = f"{document}{rng.choice(SEPARATORS)}{first}"
    messages = [] if system is None else [{"role": "system", "content": system}]
    for text, answer in zip((first, *others), replies, strict=True):
        messages.append({"role": "user", "content": text})
        messages.append({"role": "assistant", "content": answer})
    return messages


def _kinds(ids: list[int], start: int, end: int) -> Iterator[int]:
    """Mark the kinds: answers follow a start token, up to and with the end token."""
    inside = False
    for token in ids:
        yield ANSWER if inside else PLAIN
        inside = token == start or (inside and token != end)


def _tokens_of(encoding: BatchEncoding, text: str, parts: Sequence[str]) -> Iterator[int]:
    """Return the tokens of each part's first place in the text."""
    for part in parts:
        start = text.index(part)
        first = encoding.char_to_token(start)
        last = encoding.char_to_token(start + len(part) - 1)
        yield from range(first, last + 1)


def _keep_tokens(whole: TrainingSample, left: Sequence[int]) -> TrainingSample:
    """Return the sample with only these tokens, among which is all that its answers need."""
    places = {i: place for place, i in enumerate(left)}
    return TrainingSample(
        ids=tuple(whole.ids[i] for i in left),
        positions=tuple(whole.positions[i] for i in left),
        kinds=tuple(whole.kinds[i] for i in left),
        findings=tuple(
            AttentionTarget(
                range(places[each.queries.start], places[each.queries.start] + len(each.queries)),
                tuple(places[i] for i in each.gold),
            )
            for each in whole.findings
        ),
    )


def stretch(rng: random.Random, sample: TrainingSample, most: int) -> TrainingSample:
    """Return the sample as if chunks between its own had been pruned, at positions below `most`.

    Long distances are learnt at the cost of short prompts.
    """
    chunks = -(-len(sample.ids) // GAP_CHUNK_TOKENS)
    places = [rng.randrange(chunks) for _ in range(rng.randint(1, MAX_GAPS))]
    gaps = [0] * chunks
    for _ in range(rng.randint(0, max(0, most - len(sample.ids)) // GAP_CHUNK_TOKENS)):
        gaps[rng.choice(places)] += GAP_CHUNK_TOKENS
    before = list(itertools.accumulate(gaps))
    return replace(
        sample, positions=tuple(i + before[i // GAP_CHUNK_TOKENS] for i in sample.positions)
    )


def _gold_chunks(sample: TrainingSample) -> set[int]:
    return {i // GAP_CHUNK_TOKENS for finding in sample.findings for i in finding.gold}


def _conversation_chunks(sample: TrainingSample) -> set[int]:
    """Return the chunks from the first question on."""
    question = sample.kinds.index(ANSWER) - LAST_QUESTION_TOKENS
    chunks = [i // GAP_CHUNK_TOKENS for i in sample.positions]
    return {chunk for chunk in chunks if chunk >= question // GAP_CHUNK_TOKENS}
