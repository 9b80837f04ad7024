"""Kept text, tokenised again by real tokenizers."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from specprefill.core.types import Plan, PlanKind, PromptMode, Reason, Selection, Span
from specprefill.gateway.openai.text_writer import PromptTextWriter, TextEncoder

TEXTS = [
    "plain words, and 12345 numbers\n\n  with   spaces",
    "Zürich – naïve “quotes” 東京 🙂🙂 e\u0301 end",
    " leading space",
    "lo and behold",
    "\n...\n",
]
MARK = "\n...\n"


def sentence_piece(prepend: str) -> PreTrainedTokenizerFast:
    """A SentencePiece vocabulary, with a space before the first word as Llama 2's or Gemma's."""
    backend = Tokenizer(BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if prepend == "normalizer":
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(["plain words and numbers with spaces, lo and behold"], trainer)
    backend.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module", params=["demo", "first", "always", "normalizer"])
def tokenizer(request, demo_tokenizer):
    return demo_tokenizer if request.param == "demo" else sentence_piece(request.param)


def pruned(prompt, *runs: tuple[int, int]) -> Selection:
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.5, mode=PromptMode.TEXT)
    return Selection(len(prompt), tuple(Span(*run) for run in runs), plan)


@pytest.mark.parametrize("text", TEXTS)
def test_encoded_text_reads_as_itself_behind_other_tokens(tokenizer, text):
    before = tokenizer.encode("before", add_special_tokens=False)
    tokens = TextEncoder(tokenizer).encode(text)
    assert tokenizer.decode([*before, *tokens]) == tokenizer.decode(before) + text


def test_special_tokens_in_a_text_are_plain_text(demo_tokenizer):
    tokens = TextEncoder(demo_tokenizer).encode("say <|user|>now")
    assert not set(tokens) & set(demo_tokenizer.all_special_ids)
    assert demo_tokenizer.decode(tokens) == "say <|user|>now"


def test_a_text_that_the_tokenizer_changes_has_no_tokens():
    backend = sentence_piece("first").backend_tokenizer
    backend.normalizer = normalizers.Lowercase()
    changed = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert TextEncoder(changed).encode("Lo") is None
    assert TextEncoder(changed).encode("lo") is not None
    assert changed.decode(TextEncoder(changed).encode_loosely("Lo")) == "lo"


def test_runs_become_the_text_that_they_stand_for(tokenizer):
    text = "plain words, and numbers with spaces: " * 8
    prompt = tuple(tokenizer.encode(text, add_special_tokens=False))
    selection = PromptTextWriter(tokenizer, MARK).written(
        prompt, (), pruned(prompt, (0, 20), (40, 60), (len(prompt) - 9, len(prompt)))
    )
    pieces = [tokenizer.decode(prompt[: run.stop])[len(tokenizer.decode(prompt[: run.start])) :]
              for run in selection.runs]  # fmt: skip
    assert tokenizer.decode(selection.text) == MARK.join(pieces)
    assert selection.engine_tokens == len(selection.text)
    assert selection.mode is PromptMode.TEXT


def test_the_chat_template_stays_the_tokens_that_it_is(demo_tokenizer):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one two three four five six seven eight " * 20},
    ]
    prompt = tuple(
        demo_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    )
    special = set(demo_tokenizer.all_special_ids)
    runs = [(0, 20), (60, 80), (len(prompt) - 10, len(prompt))]
    found = PromptTextWriter(demo_tokenizer, MARK).written(
        prompt, (Span(0, 16),), pruned(prompt, *runs)
    )
    assert found.text[:16] == prompt[:16]
    assert [t for t in found.text if t in special] == [t for t in prompt if t in special]
    assert demo_tokenizer.decode(found.text).count(MARK) == 2


def test_half_a_character_is_kept_whole(demo_tokenizer):
    prompt = tuple(demo_tokenizer.encode("ab 東京 cd", add_special_tokens=False))
    pieces = [demo_tokenizer.decode([token]) for token in prompt]
    first = pieces.index("\ufffd")
    found = PromptTextWriter(demo_tokenizer, MARK).written(
        prompt, (), pruned(prompt, (first, first + 1))
    )
    assert demo_tokenizer.decode(found.text) == f"{MARK}東{MARK}"


@given(seed=st.integers(0, 2**32), text=st.text(max_size=60))
def test_any_text_and_any_runs_come_back_with_marks_between(demo_tokenizer, seed, text):
    prompt = tuple(demo_tokenizer.encode(f"{text} and more", add_special_tokens=False))
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(len(prompt) + 1), min(4, len(prompt) + 1) // 2 * 2))
    runs = list(zip(cuts[::2], cuts[1::2], strict=True))
    found = PromptTextWriter(demo_tokenizer, MARK).written(prompt, (), pruned(prompt, *runs))
    ends = [0, *(edge for run in found.runs for edge in (run.start, run.stop)), len(prompt)]
    expected = "".join(
        demo_tokenizer.decode(prompt[start:stop]) if place % 2 else MARK * (stop > start)
        for place, (start, stop) in enumerate(pairwise(ends))
    )
    assert demo_tokenizer.decode(found.text) == expected
