"""A draft model with a tokenizer of its own: scores come back by the characters they cover."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specprefill.config import SpeculatorConfig
from specprefill.core.types import Reason, Span
from specprefill.lab.evaluation.pair import rate_prompt
from specprefill.lab.evaluation.prompts import RenderedTask
from specprefill.speculator.draft import Draft, as_draft
from specprefill.speculator.jobs import Rating
from specprefill.speculator.scorer import Scorer, load_scorer
from specprefill.speculator.translation import (
    SamePrompt,
    TranslatedPrompt,
    Translator,
    decode,
    load_translator,
)
from tests.linear_cost import assert_linear

TEXT = "The gate code of amber fox is 48213. Ärger über 日本語 and 😀 emoji, don't panic!\n\n  Ok. "


def byte_level(merges: int, specials: Sequence[str] = ()) -> Tokenizer:
    """A byte-level BPE that has learnt `merges` merges of the text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + merges + len(specials),
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT * 4], trainer)
    return tokenizer


MAIN = byte_level(60, specials=["<|user|>"])
BYTES = byte_level(0)


@pytest.mark.parametrize("merges", [0, 20, 60])
@pytest.mark.parametrize("text", [TEXT, "", "日", "😀" * 30, "<|user|>" + TEXT])
def test_decoding_gives_the_text_and_covers_it_without_a_gap(text: str, merges: int) -> None:
    tokenizer = byte_level(merges, specials=["<|user|>"])
    encoding = tokenizer.encode(text, add_special_tokens=False)
    decoded, offsets = decode(tokenizer, encoding.ids)
    assert decoded == text
    assert len(offsets) == len(encoding.ids)
    ends = [0, *(stop for _, stop in offsets)]
    for (start, stop), before in zip(offsets, ends, strict=False):
        assert start <= before <= stop
        assert start < stop
    assert ends[-1] == len(text)


def test_the_bytes_of_one_character_share_its_place() -> None:
    ids = BYTES.encode("a日b", add_special_tokens=False).ids
    assert decode(BYTES, ids) == ("a日b", [(0, 1), (1, 2), (1, 2), (1, 2), (2, 3)])


def test_bytes_that_make_no_character_stand_for_no_text() -> None:
    ids = BYTES.encode("a日", add_special_tokens=False).ids
    assert decode(BYTES, ids[:-1]) == ("a", [(0, 1), (1, 1), (1, 1)])


@pytest.mark.parametrize("tokens", [3, 15, 16, 17, 200])
def test_bytes_of_no_character_do_not_take_the_text_behind_them(tokens: int) -> None:
    (first,) = BYTES.encode("日", add_special_tokens=False).ids[:1]
    behind = BYTES.encode("and so on", add_special_tokens=False).ids
    text, offsets = decode(BYTES, [first] * tokens + behind)
    assert text.endswith("and so on")
    assert set(text.removesuffix("and so on")) <= {"\ufffd"}
    assert len(offsets) == tokens + len(behind)
    assert [text[start:stop] for start, stop in offsets[-len("and so on") + 1 :]] == list(
        "nd so on"
    )


def test_decoding_bytes_of_no_character_takes_linear_time() -> None:
    (first,) = BYTES.encode("日", add_special_tokens=False).ids[:1]
    assert_linear(lambda size: lambda: decode(BYTES, [first] * size), 500)


def translate(offsets: list[tuple[int, int]], main: list[tuple[int, int]]) -> TranslatedPrompt:
    return TranslatedPrompt((0,) * len(offsets), np.array(offsets), np.array(main))


def test_scores_follow_the_characters() -> None:
    several = translate([(0, 2), (2, 6), (6, 6)], [(0, 4), (4, 5), (5, 6), (6, 6)])
    scores = several.scores(np.array([1.0, 3.0, 100.0], dtype=np.float32))
    assert scores.dtype == np.float32
    assert scores.tolist() == [2.0, 3.0, 3.0, 0.0]


def test_characters_of_no_draft_token_do_not_count() -> None:
    gap = translate([(0, 2), (4, 6)], [(0, 3), (3, 4), (3, 6)])
    assert gap.scores(np.array([1.0, 5.0], dtype=np.float32)).tolist() == [1.0, 0.0, 5.0]


def test_draft_tokens_that_share_a_character_count_alike() -> None:
    shared = translate([(0, 1), (0, 1), (1, 2)], [(0, 1), (0, 2)])
    scores = shared.scores(np.array([1.0, 3.0, 4.0], dtype=np.float32))
    assert scores.tolist() == [2.0, 3.0]


@given(st.text(alphabet="abc 日é😀don't.\n", min_size=1, max_size=60))
def test_every_main_token_gets_the_score_of_its_own_text(text: str) -> None:
    translator = Translator(MAIN, BYTES, draft_bos=None)
    ids = MAIN.encode(text, add_special_tokens=False).ids
    result = translator.translate(ids)
    assert BYTES.decode(result.prompt) == text
    places = result.offsets.mean(axis=1).astype(np.float32)  # the middle of each draft token
    middles = result.main_offsets.mean(axis=1)
    np.testing.assert_allclose(result.scores(places), middles, rtol=1e-5)


def test_a_draft_that_starts_with_bos_gets_one_and_its_score_goes_nowhere() -> None:
    translator = Translator(MAIN, BYTES, draft_bos=7)
    result = translator.translate(MAIN.encode("ab", add_special_tokens=False).ids)
    assert len(result.prompt) == 3
    assert result.prompt[0] == 7
    assert result.scores(np.array([9.0, 1.0, 1.0], dtype=np.float32)).max() == 1.0


def test_the_draft_reads_a_part_in_its_own_tokens() -> None:
    ids = tuple(MAIN.encode(TEXT, add_special_tokens=False).ids)
    spans = (Span(1, 4), Span(6, 7))
    text = "".join(MAIN.decode(ids[span.start : span.stop]) for span in spans)
    parts = Translator(MAIN, BYTES, draft_bos=None).translate(ids).parts(spans)
    assert BYTES.decode(parts) == text
    assert SamePrompt(ids).parts(spans) == (*ids[1:4], *ids[6:7])


def saved(folder: Path, tokenizer: Tokenizer, **more: str) -> str:
    folder.mkdir()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **more).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def word_level(vocabulary: dict[str, int]) -> Tokenizer:
    return Tokenizer(models.WordLevel(vocabulary, unk_token="a"))


def test_vocabularies_are_compared_by_token_and_id(tmp_path: Path) -> None:
    main = saved(tmp_path / "main", word_level({"a": 0, "b": 1}))
    same = saved(tmp_path / "another-name", word_level({"a": 0, "b": 1}))
    swapped = saved(tmp_path / "swapped", word_level({"a": 1, "b": 0}))
    longer = saved(tmp_path / "longer", word_level({"a": 0, "b": 1, "c": 2}))
    assert load_translator(main, same) is None
    assert load_translator(main, longer) is None  # every main token means the same to the draft
    assert isinstance(load_translator(longer, main), Translator)
    assert isinstance(load_translator(main, swapped), Translator)


def test_bos_is_put_where_the_drafts_tokenizer_puts_it(tmp_path: Path) -> None:
    draft = byte_level(0, specials=["<s>"])
    bos = draft.token_to_id("<s>")
    draft.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", bos)]
    )
    main = saved(tmp_path / "main", MAIN)
    translator = load_translator(main, saved(tmp_path / "draft", draft, bos_token="<s>"))
    assert translator is not None
    assert translator.translate(MAIN.encode("ab").ids).prompt[0] == bos


def tiny_draft(vocabulary: int) -> Draft:
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return as_draft(LlamaForCausalLM(config).eval())


def test_a_scorer_gives_one_score_per_main_token() -> None:
    draft = tiny_draft(BYTES.get_vocab_size())
    translator = Translator(MAIN, BYTES, draft_bos=None)
    scorer = Scorer(draft, 4, 64, pool_tokens=13, translator=translator)
    prompts = [tuple(MAIN.encode(TEXT * count).ids) for count in (1, 3)]
    own = Scorer(draft, 4, 64, pool_tokens=13)
    for prompt, scores in zip(prompts, scorer.score(prompts), strict=True):
        (by_byte,) = own.score([tuple(BYTES.encode(MAIN.decode(prompt)).ids)])
        assert len(by_byte) > len(prompt)
        assert len(scores) == len(prompt)
        np.testing.assert_allclose(scores, translator.translate(prompt).scores(by_byte), rtol=1e-4)
    assert scorer.vocabulary_size == MAIN.get_vocab_size()


def test_the_evaluation_rates_a_pair_of_two_tokenizers_as_the_service_does() -> None:
    translator = Translator(MAIN, BYTES, draft_bos=None)
    scorer = Scorer(
        tiny_draft(BYTES.get_vocab_size()), 4, 64, pool_tokens=13, translator=translator
    )
    prompt = tuple(MAIN.encode(TEXT).ids)
    assert max(prompt) >= scorer.draft.vocabulary_size  # the draft has no such token
    rating, by_paper = rate_prompt(scorer, RenderedTask(prompt, (), ()))
    assert by_paper is rating
    assert isinstance(rating, Rating)
    np.testing.assert_allclose(rating.scores, scorer.score([prompt])[0], rtol=1e-5)
    refusal = Reason.PROMPT_TOO_LONG_FOR_SPECULATOR
    assert rate_prompt(scorer, RenderedTask(prompt * 500, (), ())) == (refusal, refusal)


def test_a_scorer_is_loaded_with_the_translation_it_needs(tmp_path: Path) -> None:
    main = saved(tmp_path / "main", MAIN)
    folder = saved(tmp_path / "draft", BYTES)
    tiny_draft(BYTES.get_vocab_size()).model.config.save_pretrained(folder)
    config = SpeculatorConfig(path=folder, random_weights=True, device="cpu")
    prompt = tuple(MAIN.encode(TEXT).ids)
    (scores,) = load_scorer(config, 13, main_path=main).score([prompt])
    assert len(scores) == len(prompt)
    assert load_scorer(config, 13, main_path=folder).translator is None
