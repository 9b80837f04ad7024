"""Output of vLLM's own detokenizer after prompts that end inside a character."""

from __future__ import annotations

from typing import Any

import pytest
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.v1.engine import EngineCoreRequest
from vllm.v1.engine.detokenizer import IncrementalDetokenizer

from specprefill.core.errors import InvalidRequest
from specprefill.engine.half_characters import leak_of

SECRET = "The secret is swordfish. "
FACE = "\U0001f642"


def answered(tokenizer: Any, prompt: list[int], answer: list[int], **fields: Any) -> str:
    """The text of `answer` as an engine of ours gives it: vLLM's deltas, less the leak."""
    params = SamplingParams(output_kind=RequestOutputKind.DELTA, **fields)
    request = EngineCoreRequest(
        request_id="r", prompt_token_ids=prompt, mm_features=None, sampling_params=params,
        pooling_params=None, arrival_time=0.0, lora_request=None, cache_salt=None,
        data_parallel_rank=None,
    )  # fmt: skip
    detokenizer = IncrementalDetokenizer.from_new_request(tokenizer, request)
    leak = leak_of(prompt, params, tokenizer)
    text = ""
    for token in answer:
        detokenizer.update([token], stop_terminated=False)
        text += leak.cut(detokenizer.get_next_output_text(finished=False, delta=True))
    return text


@pytest.fixture
def parts(demo_tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a text, and of a character that takes several."""
    face = demo_tokenizer.encode(FACE, add_special_tokens=False)
    assert len(face) > 1
    return demo_tokenizer.encode(SECRET, add_special_tokens=False), face


@pytest.mark.parametrize("length", [1, 400])
def test_the_prompt_is_no_part_of_the_answer(
    demo_tokenizer: Any, parts: tuple[list[int], list[int]], length: int
) -> None:
    text, face = parts
    after = demo_tokenizer.encode(" and more", add_special_tokens=False)
    text_out = answered(demo_tokenizer, [*text * length, *face[:-1]], [face[-1], *after])
    assert text_out == f"{FACE} and more"


def test_neither_where_the_character_is_never_completed(
    demo_tokenizer: Any, parts: tuple[list[int], list[int]]
) -> None:
    text, face = parts
    after = demo_tokenizer.encode(" and more", add_special_tokens=False)
    text_out = answered(demo_tokenizer, [*text, *face[:-1]], after)
    assert text_out.endswith(" and more")
    assert "swordfish" not in text_out


def test_a_whole_prompt_loses_nothing(
    demo_tokenizer: Any, parts: tuple[list[int], list[int]]
) -> None:
    text, face = parts
    text_out = answered(demo_tokenizer, [*text, *face], [*face, *text], stop=["never written"])
    assert text_out.startswith(FACE)
    special = [demo_tokenizer.bos_token_id] * 40
    assert answered(demo_tokenizer, [*text, *special], text) == SECRET


def test_stop_strings_would_be_found_in_the_prompt(
    demo_tokenizer: Any, parts: tuple[list[int], list[int]]
) -> None:
    text, face = parts
    with pytest.raises(InvalidRequest) as refused:
        leak_of([*text, face[0]], SamplingParams(stop=["fish"]), demo_tokenizer)
    assert refused.value.field == "stop"
