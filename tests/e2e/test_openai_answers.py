"""What vLLM's own tests of its OpenAI front promise about a model's answers, over real engines.

See `tests/contract/test_openai_compatibility.py` for what needs no model.
"""

from __future__ import annotations

import json
import re

import pytest

from .conftest import pruned

pytestmark = pytest.mark.timeout(600)

WHETHER_PRUNED = pytest.mark.parametrize(
    "extra", [{"specprefill": False}, pruned()], ids=["dense", "pruned"]
)


@pytest.fixture
def complete(client, long_prompt):
    """A greedy completion of the long prompt's text, pruned or not."""

    def ask(extra, **options):
        options = {"temperature": 0, "max_tokens": 5, **options}
        prompt = options.pop("prompt", long_prompt.messages[-1]["content"])
        return client.completions.create(
            model="demo", prompt=prompt, extra_body={"ignore_eos": True, **extra}, **options
        )

    return ask


@WHETHER_PRUNED
def test_so_many_tokens_as_were_asked_for(complete, extra):
    answer = complete(extra)
    assert answer.choices[0].finish_reason == "length"
    usage = answer.usage
    assert usage.completion_tokens == 5
    assert usage.total_tokens == usage.prompt_tokens + 5


@WHETHER_PRUNED
def test_the_prompts_length_is_the_callers_whatever_was_kept(complete, extra, demo_tokenizer):
    prompt = "The code is 4711. " * 100
    answer = complete(extra, prompt=prompt)
    assert answer.usage.prompt_tokens == len(demo_tokenizer.encode(prompt))


@WHETHER_PRUNED
def test_token_ids_and_text_agree(complete, extra, demo_tokenizer):
    answer = complete({**extra, "return_token_ids": True}, logprobs=0)
    ids = answer.choices[0].model_extra["token_ids"]
    assert demo_tokenizer.decode(ids, skip_special_tokens=True) == answer.choices[0].text
    assert "".join(answer.choices[0].logprobs.tokens) == demo_tokenizer.decode(ids)


@WHETHER_PRUNED
def test_a_bias_forces_and_forbids(complete, extra, demo_tokenizer):
    (forced,) = demo_tokenizer.encode(" the", add_special_tokens=False)[:1]
    answer = complete({**extra, "return_token_ids": True}, logit_bias={str(forced): 100})
    assert answer.choices[0].model_extra["token_ids"] == [forced] * 5
    first = complete({**extra, "return_token_ids": True}).choices[0].model_extra["token_ids"][0]
    answer = complete({**extra, "return_token_ids": True}, logit_bias={str(first): -100})
    assert first not in answer.choices[0].model_extra["token_ids"]


@WHETHER_PRUNED
def test_only_allowed_tokens(complete, extra):
    more = {**extra, "return_token_ids": True, "allowed_token_ids": [300, 301]}
    answer = complete(more)
    assert set(answer.choices[0].model_extra["token_ids"]) <= {300, 301}


@WHETHER_PRUNED
def test_a_stop_token_ends_the_answer(complete, extra):
    ids = complete({**extra, "return_token_ids": True}).choices[0].model_extra["token_ids"]
    answer = complete({**extra, "stop_token_ids": [ids[2]]}, max_tokens=16)
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].model_extra["stop_reason"] == ids[2]
    assert answer.usage.completion_tokens == ids.index(ids[2]) + 1


@WHETHER_PRUNED
def test_as_many_tokens_at_least(complete, extra):
    answer = complete({**extra, "ignore_eos": False, "min_tokens": 9}, max_tokens=9)
    assert answer.usage.completion_tokens == 9


@WHETHER_PRUNED
def test_samples_differ_and_a_seed_repeats_them(complete, extra):
    def texts():
        answer = complete(extra, n=3, temperature=1.5, max_tokens=12, seed=42)
        assert [choice.index for choice in answer.choices] == [0, 1, 2]
        return [choice.text for choice in answer.choices]

    first = texts()
    assert len(set(first)) == 3
    assert texts() == first


@WHETHER_PRUNED
def test_streamed_samples_are_the_whole_ones(complete, extra):
    options = {"n": 2, "temperature": 1.5, "max_tokens": 8, "seed": 7}
    streamed = ["", ""]
    for event in complete(extra, stream=True, **options):
        for choice in event.choices:
            streamed[choice.index] += choice.text
    assert streamed == [choice.text for choice in complete(extra, **options).choices]


@WHETHER_PRUNED
@pytest.mark.parametrize(("asked", "got"), [(0, (1,)), (5, (5, 6))])
def test_so_many_logprobs(complete, extra, asked, got):
    logprobs = complete(extra, logprobs=asked).choices[0].logprobs
    assert len(logprobs.token_logprobs) == 5
    assert all(len(each) in got for each in logprobs.top_logprobs)
    assert all(value <= 0 for value in logprobs.token_logprobs)


def test_prompt_logprobs_are_of_every_prompt_token(complete, demo_tokenizer):
    prompt = "A robot may not injure another robot"
    answer = complete({"prompt_logprobs": 1}, prompt=prompt)
    entries = answer.choices[0].model_extra["prompt_logprobs"]
    assert len(entries) == len(demo_tokenizer.encode(prompt))
    assert entries[0] is None
    assert all(entries[1:])
    assert answer.specprefill["plan"] == "dense"


def test_echo_with_logprobs_begins_with_the_prompt(complete, demo_tokenizer):
    prompt = "A robot may not"
    answer = complete({}, prompt=prompt, echo=True, logprobs=1, max_tokens=2)
    choice, tokens = answer.choices[0], len(demo_tokenizer.encode(prompt))
    assert choice.text.startswith(prompt)
    assert len(choice.logprobs.tokens) == tokens + 2
    assert choice.logprobs.token_logprobs[0] is None
    assert all(value <= 0 for value in choice.logprobs.token_logprobs[1:])


def test_prompts_of_a_list_are_answered_each_for_itself(complete, client):
    prompts = ["A robot may not", "The quick brown fox", "One, two, three,"]
    together = complete({}, prompt=prompts)
    alone = [complete({}, prompt=prompt).choices[0].text for prompt in prompts]
    assert [choice.text for choice in together.choices] == alone


@pytest.mark.parametrize(
    ("outputs", "pattern"),
    [
        ({"regex": r"\d{3}-[ab]{2}"}, r"\d{3}-[ab]{2}"),
        ({"choice": ["left", "right"]}, r"left|right"),
    ],
)
@WHETHER_PRUNED
def test_the_output_is_as_constrained(chat, extra, outputs, pattern):
    answer = chat(max_tokens=16, extra_body={**extra, "structured_outputs": outputs})
    assert re.fullmatch(pattern, answer.choices[0].message.content)


PARAMETERS = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}},
    "required": ["sure"],
    "additionalProperties": False,
}


@pytest.fixture
def no_blanks(demo_tokenizer):
    """A grammar allows blanks anywhere, and a small model may like nothing better."""
    tokens = range(len(demo_tokenizer))
    return {str(token): -100 for token in tokens if not demo_tokenizer.decode([token]).strip()}


@WHETHER_PRUNED
def test_a_streamed_tool_call_adds_up_to_the_whole_one(chat, extra, no_blanks):
    function = {"name": "decide", "parameters": PARAMETERS, "strict": True}
    tool = {"type": "function", "function": function}
    choice = {"type": "function", "function": {"name": "decide"}}
    options = {
        "tools": [tool], "tool_choice": choice, "max_tokens": 64, "logit_bias": no_blanks,
        "extra_body": extra,
    }  # fmt: skip
    whole = chat(**options)
    (call,) = whole.choices[0].message.tool_calls
    arguments, names = "", set()
    for event in chat(stream=True, **options):
        for piece in (event.choices[0].delta.tool_calls or ()) if event.choices else ():
            arguments += piece.function.arguments or ""
            names |= {piece.function.name} - {None}
    assert names == {call.function.name} == {"decide"}
    assert json.loads(arguments) == json.loads(call.function.arguments)
