"""Chunks by the text of a model's own vocabulary."""

import itertools
import logging

import pytest

from specprefill.config import SelectionConfig
from specprefill.speculator.chunking import Chunker, load_chunker, token_texts

TEXT = (
    "The key of the north gate is 4711. Nobody was told about it, not even the guard.\n"
    "In the morning the ships left the harbour; the tide was high. They came back at noon.\n"
) * 4


def texts_of(chunks, prompt, tokenizer):
    edges = [*chunks.starts.tolist(), len(prompt)]
    return [tokenizer.decode(prompt[a:b]) for a, b in itertools.pairwise(edges)]


def test_chunks_hold_whole_sentences_or_clauses(demo_tokenizer):
    prompt = demo_tokenizer.encode(TEXT, add_special_tokens=False)
    chunker = Chunker.of(SelectionConfig(), demo_tokenizer)
    found = texts_of(chunker.chunks(prompt), prompt, demo_tokenizer)
    assert "".join(found) == TEXT
    ends = [text.rstrip()[-1] for text in found]
    assert set(ends) <= set(".,;"), found


def test_equal_chunks_are_to_be_had(demo_tokenizer):
    prompt = demo_tokenizer.encode(TEXT, add_special_tokens=False)
    chunker = Chunker.of(SelectionConfig(chunks="equal", chunk_tokens=32), demo_tokenizer)
    assert set(chunker.chunks(prompt).sizes.tolist()[:-1]) == {32}


def test_a_word_keeps_its_leading_blank(demo_tokenizer):
    texts = token_texts(demo_tokenizer)
    assert len(texts) == len(demo_tokenizer)
    (token,) = demo_tokenizer.encode(" the", add_special_tokens=False)
    assert texts[token] == " the"


def test_without_a_tokenizer_chunks_are_equal_and_a_warning_says_so(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        chunker = load_chunker(SelectionConfig(), str(tmp_path))
    assert chunker.borders is None
    assert "chunks do not follow the text" in caplog.text


@pytest.mark.parametrize("size", [1, 16])
def test_the_shortest_prompt_is_one_chunk(demo_tokenizer, size):
    chunker = Chunker.of(SelectionConfig(chunk_tokens=size), demo_tokenizer)
    assert chunker.chunks([5]).starts.tolist() == [0]
