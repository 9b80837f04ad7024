"""Offsets by the tokens' bytes are those of tokenising again."""

import pytest

from specprefill.gateway import offsets
from specprefill.gateway.offsets import PromptOffsets

TEXTS = [
    "plain words, and 12345 numbers\n\n  with   spaces",
    "Zürich – naïve “quotes” 東京 🙂🙂 e\u0301 end",
    "<|im_start|>user\nspecial tokens<|im_end|>\n",
    "",
]


class CountedTokenizer:
    """The backend, and how often it was asked."""

    def __init__(self, backend):
        self.backend, self.asked = backend, 0

    def encode(self, text, *, add_special_tokens):
        self.asked += 1
        return self.backend.encode(text, add_special_tokens=add_special_tokens)


@pytest.fixture
def found(demo_tokenizer):
    made = PromptOffsets(demo_tokenizer)
    made._backend = CountedTokenizer(made._backend)
    return made


@pytest.mark.parametrize("text", TEXTS)
def test_they_are_the_tokenizers_own(found, demo_tokenizer, text):
    encoding = demo_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    mine = found.find(text, encoding.ids)
    assert found._backend.asked == 0
    assert [list(pair) for pair in mine] == [list(pair) for pair in encoding.offsets]


def test_a_token_before_the_text_has_no_width(found, demo_tokenizer):
    encoding = demo_tokenizer.backend_tokenizer.encode("some text", add_special_tokens=False)
    bos = min(found.special_ids)
    assert found.find("some text", [bos, *encoding.ids]) == [(0, 0), *encoding.offsets]
    assert found._backend.asked == 0


def test_other_tokens_than_the_texts_have_none(found, demo_tokenizer):
    ids = demo_tokenizer.encode("some text", add_special_tokens=False)
    assert found.find("other text", ids) is None
    assert found.find("some", ids) is None
    assert found._backend.asked == 2


def test_a_vocabulary_of_another_kind_is_tokenised_again(found, demo_tokenizer):
    text = "some text"
    encoding = demo_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    found._bytes = offsets._token_bytes({"\u2581some": encoding.ids[0]})
    assert found.find(text, encoding.ids) == encoding.offsets
    assert found._backend.asked == 1
