"""Generated needle prompts: the wished length, one needle, the same text for the same seed."""

from __future__ import annotations

import random
import re

import pytest

from specprefill.synthetic import corpus
from specprefill.synthetic.needles import needle_prompt, render


class WordTokenizer:
    """One token per word, digit or sign: what the demo tokenizer makes of generated text."""

    def apply_chat_template(self, conversation, /, *, tokenize, add_generation_prompt):
        turns = "".join(f"<{turn['role']}>{turn['content']}" for turn in conversation)
        return f"{turns}<assistant>" if add_generation_prompt else turns

    def encode(self, text, /, *, add_special_tokens):
        return re.findall(r"[A-Za-z]+|[^\sA-Za-z]", text)


TOKENIZER = WordTokenizer()


@pytest.mark.parametrize("tokens", [96, 257, 1024, 4096])
def test_a_prompt_has_the_length_that_was_asked_for(tokens):
    lengths = [needle_prompt(seed, tokens, TOKENIZER).prompt_tokens for seed in range(8)]
    assert all(abs(length - tokens) <= 2 for length in lengths), lengths


def test_one_seed_is_one_prompt():
    assert needle_prompt(3, 300, TOKENIZER) == needle_prompt(3, 300, TOKENIZER)
    assert needle_prompt(3, 300, TOKENIZER) != needle_prompt(4, 300, TOKENIZER)


def test_the_needle_stands_once():
    for seed in range(20):
        prompt = needle_prompt(seed, 512, TOKENIZER)
        text = render(prompt.messages, TOKENIZER)
        assert prompt.gold == f"{prompt.key} {prompt.answer}"
        assert text.count(prompt.gold) == 1


@pytest.mark.parametrize(("depth", "nearest"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0)])
def test_the_depth_places_the_needle(depth, nearest):
    prompt = needle_prompt(0, 2048, TOKENIZER, depth=depth)
    text = render(prompt.messages, TOKENIZER)
    assert text.index(prompt.gold) / len(text) == pytest.approx(nearest, abs=0.1)


def test_a_length_that_cannot_hold_the_records_is_refused():
    with pytest.raises(ValueError, match="cannot hold 9 records"):
        needle_prompt(0, 64, TOKENIZER, records=9)


def test_records_have_distinct_keys_and_share_words():
    facts = corpus.records(random.Random(0), 40)
    keys = [fact.key for fact in facts]
    assert len(set(keys)) == 40
    assert len({word for key in keys for word in key.split()}) < 80


def test_filler_never_looks_like_a_record():
    rng = random.Random(0)
    words = {word for _ in range(500) for word in re.findall(r"\w+", corpus.filler_sentence(rng))}
    assert not words & {*corpus.KEY_ADJECTIVES, *corpus.KEY_NOUNS}
    assert not any(word.isdigit() for word in words)
