"""Offsets by the tokens' bytes are those of tokenising again."""

import pytest

from specprefill.core.occurrences import Cancelled
from specprefill.gateway.openai import offsets
from specprefill.gateway.openai.offsets import PromptOffsets

from ..linear_cost import assert_linear

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


def pairs(offsets):
    return [tuple(pair) for pair in offsets.tolist()]


def never():
    return False


@pytest.mark.parametrize("text", TEXTS)
def test_they_are_the_tokenizers_own(found, demo_tokenizer, text):
    encoding = demo_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    mine = found.find(text, encoding.ids)
    assert found._backend.asked == 0
    assert pairs(mine) == encoding.offsets


def test_a_token_before_the_text_has_no_width(found, demo_tokenizer):
    encoding = demo_tokenizer.backend_tokenizer.encode("some text", add_special_tokens=False)
    bos = min(found.special_ids)
    assert pairs(found.find("some text", [bos, *encoding.ids])) == [(0, 0), *encoding.offsets]
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
    assert pairs(found.find(text, encoding.ids)) == encoding.offsets
    assert found._backend.asked == 1


class PlainTokenizer:
    """Known by its `decode` alone, as tokenizers that are no fast ones are."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.longest = 0

    def decode(self, ids, skip_special_tokens=False):
        self.longest = max(self.longest, len(ids))
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("kind", ["bytes", "decode"])
def test_token_ids_are_placed_in_their_own_text(demo_tokenizer, text, kind):
    encoding = demo_tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
    known = demo_tokenizer if kind == "bytes" else PlainTokenizer(demo_tokenizer)
    placed = PromptOffsets(known).place(None, encoding.ids, never)
    assert placed.text == text
    assert pairs(placed.offsets) == encoding.offsets


@pytest.mark.parametrize("cut", [slice(5, None), slice(None, -5), slice(3, -3)])
def test_a_truncated_prompt_is_placed_in_the_text_that_is_left(found, demo_tokenizer, cut):
    encoding = demo_tokenizer.backend_tokenizer.encode(TEXTS[0], add_special_tokens=False)
    placed = found.place(TEXTS[0], encoding.ids[cut], never)
    left = encoding.offsets[cut]
    assert placed.text == TEXTS[0][left[0][0] : left[-1][1]]
    start = left[0][0]
    assert pairs(placed.offsets) == [(a - start, b - start) for a, b in left]


def test_a_prompt_that_is_cut_inside_characters_keeps_the_rest(found, demo_tokenizer):
    ids = demo_tokenizer.encode("🙂 end 🙂", add_special_tokens=False)
    placed = found.place(None, ids[1:-1], never)
    assert " end " in placed.text
    assert len(placed.offsets) == len(ids) - 2
    at = placed.text.index(" end ")
    inside = [i for i, (a, b) in enumerate(pairs(placed.offsets)) if a < at + 5 and b > at]
    assert demo_tokenizer.decode([ids[1:-1][i] for i in inside]) == " end "


def test_tokens_that_are_no_text_are_placed_too(demo_tokenizer):
    plain = PlainTokenizer(demo_tokenizer)
    half = demo_tokenizer.encode("🙂", add_special_tokens=False)[:1]
    placed = PromptOffsets(plain).place(None, half * 50, never)
    assert len(placed.offsets) == 50
    assert plain.longest <= 2 * 4


def test_decoding_that_nobody_waits_for_ends(demo_tokenizer):
    with pytest.raises(Cancelled):
        PromptOffsets(PlainTokenizer(demo_tokenizer)).place(None, [20] * 1000, lambda: True)


@pytest.mark.parametrize("plain", [False, True])
def test_placing_costs_one_walk_of_the_prompt(demo_tokenizer, plain):
    made = PromptOffsets(PlainTokenizer(demo_tokenizer) if plain else demo_tokenizer)
    ids = demo_tokenizer.encode(TEXTS[1], add_special_tokens=False)
    assert_linear(lambda size: lambda: made.place(None, ids * size, never), 20)
