"""HTTP in, tokens out, through three pools of real engines."""

import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from specprefill.synthetic.needles import needle_prompt

from .conftest import KEEP, STAGES, pruned

pytestmark = pytest.mark.timeout(600)

BLOCK_SIZE = 32  # of the shipped file's engines
AUTOMATIC = {"specprefill": {"enabled": True, "keep": "auto"}}  # asked for: whether it pays or not


# --- chat and completions -------------------------------------------------------------------


def test_chat_tells_what_was_kept(chat, demo_tokenizer):
    new = needle_prompt(72, 1500, demo_tokenizer)  # no decode engine has it
    answer = chat(messages=new.messages)
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.prompt_tokens == new.prompt_tokens
    report = answer.specprefill
    assert (report["plan"], report["reason"]) == ("prune", "asked")
    assert report["prompt_tokens"] == new.prompt_tokens
    assert 0 < report["kept_tokens"] < 0.5 * new.prompt_tokens
    assert report["keep_rate"] == pytest.approx(
        report["kept_tokens"] / report["prompt_tokens"], abs=1e-5
    )
    assert all(report[stage] >= 0 for stage in STAGES)
    assert report["speculate_s"] > 0
    assert report["prefilled_by"] == "prefill"
    assert not report["recomputed"]


def test_where_scores_choose_the_rate_the_answer_is_the_dense_one(chat, demo_tokenizer):
    for seed in (81, 82, 83):
        messages = needle_prompt(seed, 1500, demo_tokenizer).messages
        dense = chat(messages=messages, extra_body={"specprefill": False})
        chosen = chat(messages=messages, extra_body=AUTOMATIC)
        assert (chosen.specprefill["plan"], chosen.specprefill["reason"]) == ("prune", "auto")
        assert 0.0 < chosen.specprefill["keep_rate"] < 0.6
        assert chosen.choices[0].message.content == dense.choices[0].message.content


def test_the_same_prompt_again_is_computed_where_its_kv_is(chat):
    """Two of three requests come through the same gateway."""
    answers = [chat() for _ in range(3)]
    local = [each for each in answers if each.specprefill["prefilled_by"] == "decode"]
    assert local
    assert local[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_a_stream_says_the_same_as_a_whole_answer(chat):
    events = list(chat(stream=True))
    text = "".join(event.choices[0].delta.content or "" for event in events if event.choices)
    assert text == chat().choices[0].message.content
    assert events[-1].specprefill["plan"] == "prune"


def test_the_stream_can_end_with_the_usage(chat, long_prompt):
    events = list(chat(stream=True, stream_options={"include_usage": True}))
    assert events[-1].usage.prompt_tokens == long_prompt.prompt_tokens
    assert events[-1].usage.completion_tokens > 0


def test_dense_and_keep_one_give_the_same_answer(chat):
    dense = chat(extra_body={"specprefill": False})
    whole = chat(extra_body={"specprefill": {"keep": 1}})
    assert dense.specprefill["reason"] == "asked_off"
    assert whole.specprefill["reason"] == "keep_is_one"
    assert dense.specprefill["kept_tokens"] == dense.specprefill["prompt_tokens"]
    assert dense.choices[0].message.content == whole.choices[0].message.content


@pytest.mark.parametrize("options", [{"specprefill": False}, pruned()], ids=["dense", "pruned"])
def test_cached_tokens_are_those_of_the_prefill_engine(client, long_prompt, options):
    (first, *rest) = long_prompt.messages
    new = {**first, "content": f"{uuid.uuid4().hex} {first['content']}"}  # nobody has asked this

    def ask():
        answer = client.chat.completions.create(
            model="demo", messages=[new, *rest], temperature=0, max_tokens=2, extra_body=options
        )
        return answer.usage.prompt_tokens_details, answer.specprefill["kept_tokens"]

    cold, kept = ask()
    warm, kept_again = ask()
    assert cold.cached_tokens == 0
    assert kept_again == kept
    assert warm.cached_tokens == (kept - 1) // BLOCK_SIZE * BLOCK_SIZE


def test_only_requests_of_the_same_salt_share_caches(client, long_prompt):

    def ask(salt):
        answer = client.chat.completions.create(
            model="demo",
            messages=long_prompt.messages,
            temperature=0,
            max_tokens=8,
            extra_body={**pruned(), "cache_salt": salt},
        )
        cached = answer.usage.prompt_tokens_details.cached_tokens
        return answer.choices[0].message.content, cached

    mine, yours = uuid.uuid4().hex, uuid.uuid4().hex
    answer, cold = ask(mine)
    again, warm = ask(mine)
    other, foreign = ask(yours)
    assert answer == again == other
    assert cold == foreign == 0
    assert warm > 0


def test_a_short_prompt_is_left_whole(client):
    answer = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": "Hello"}], max_tokens=4
    )
    assert answer.specprefill["reason"] == "short_prompt"
    assert answer.specprefill["prefilled_by"] == "decode"


@pytest.mark.parametrize("stream", [False, True])
def test_completions(client, long_prompt, stream):
    answer = client.completions.create(
        model="demo", prompt=long_prompt.messages[-1]["content"], max_tokens=6, temperature=0,
        stream=stream, extra_body=pruned(ignore_eos=True),
    )  # fmt: skip
    events = list(answer) if stream else [answer]
    assert "".join(event.choices[0].text for event in events if event.choices)
    assert events[-1].specprefill["plan"] == "prune"


# --- sampling -------------------------------------------------------------------------------


def test_two_samples(chat):
    answer = chat(n=2, temperature=1.0, seed=1)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert all(choice.finish_reason for choice in answer.choices)
    assert answer.usage.completion_tokens >= 2


def test_samples_without_a_choice_agree(chat):
    first, second = chat(n=2, temperature=1.0, extra_body=pruned(top_k=1)).choices
    assert first.message.content == second.message.content


def test_a_stop_string_ends_the_answer(chat):
    text = chat(max_tokens=16, extra_body=pruned(ignore_eos=True))
    whole = text.choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    answer = chat(max_tokens=16, stop=[stop])
    assert answer.choices[0].finish_reason == "stop"
    assert stop not in answer.choices[0].message.content
    assert whole.startswith(answer.choices[0].message.content)


def test_logprobs(chat):
    answer = chat(logprobs=True, top_logprobs=3)
    entries = answer.choices[0].logprobs.content
    assert len(entries) == answer.usage.completion_tokens
    for entry in entries:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == pytest.approx(max(top.logprob for top in entry.top_logprobs))


def test_a_seed_makes_sampling_reproducible(chat):
    texts = {chat(temperature=1.5, seed=5).choices[0].message.content for _ in range(3)}
    assert len(texts) == 1


def test_a_tool_call_follows_its_schema(chat, demo_tokenizer):
    schema = {
        "type": "object",
        "properties": {"unit": {"type": "string", "enum": ["metre", "mile"]}},
        "required": ["unit"],
        "additionalProperties": False,
    }
    function = {"name": "measure", "parameters": schema, "strict": True}
    # The grammar allows blanks anywhere, and a small model may like nothing better.
    blanks = {
        str(token): -100
        for token in range(len(demo_tokenizer))
        if not demo_tokenizer.decode([token]).strip()
    }
    answer = chat(
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "measure"}},
        max_tokens=64,
        logit_bias=blanks,
    )
    (call,) = answer.choices[0].message.tool_calls
    assert call.function.name == "measure"
    assert json.loads(call.function.arguments)["unit"] in {"metre", "mile"}


def test_the_output_follows_a_json_schema(chat):
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "side": {"enum": ["left", "right"]}},
        "required": ["sure", "side"],
        "additionalProperties": False,
    }
    answer = chat(
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}},
    )
    said = json.loads(answer.choices[0].message.content)
    assert isinstance(said["sure"], bool)
    assert said["side"] in {"left", "right"}


def test_eight_requests_at_once_give_the_answers_of_one(chat):
    alone = chat().choices[0].message.content
    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda _: chat().choices[0].message.content, range(8)))
    assert together == [alone] * 8


# --- errors ---------------------------------------------------------------------------------


def test_an_unknown_model_is_404(client):
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="none", messages=[{"role": "user", "content": "x"}])
    assert "none" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "param"),
    [
        ({"keep": 0}, "specprefill.keep"),
        ({"keep": 1.5}, "specprefill.keep"),
        ({"keep": "half"}, "specprefill.keep"),
        ({"kep": 0.5}, "specprefill.kep"),
        ("yes", "specprefill"),
    ],
)
def test_a_bad_control_is_400_and_named(chat, field, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(extra_body={"specprefill": field})
    assert caught.value.param == param
    assert "Traceback" not in str(caught.value)


def test_a_prompt_beyond_the_model_is_400(client):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[20] * 9000, max_tokens=1)
    assert "8192" in str(caught.value)


def test_an_empty_prompt_is_400(client):
    with pytest.raises(openai.BadRequestError):
        client.completions.create(model="demo", prompt="", max_tokens=1)


def test_a_deadline_that_passes_is_504(app, long_prompt):
    reply = httpx.post(
        f"{app.http_url}/v1/chat/completions",
        json={"messages": long_prompt.messages, "max_tokens": 2000, "ignore_eos": True},
        headers={"x-request-timeout-seconds": "1.0"},
        timeout=60,
    )
    assert reply.status_code == 504
    assert reply.json()["error"]["code"] == "deadline_exceeded"


def test_clients_that_leave_free_the_engines(app, chat, long_prompt):
    """More endless answers than the decode engine can run at once, all abandoned."""

    def leave(_):
        body = {
            "messages": long_prompt.messages, "max_tokens": 6000, "ignore_eos": True,
            "stream": True, "specprefill": {"keep": KEEP},
        }  # fmt: skip
        url = f"{app.http_url}/v1/chat/completions"
        with httpx.stream("POST", url, json=body, timeout=60) as reply:
            lines = (line for line in reply.iter_lines() if line.startswith("data: {"))
            for _ in range(5):
                next(lines)

    with ThreadPoolExecutor(16) as threads:
        list(threads.map(leave, range(32)))
    started_s = time.monotonic()
    assert chat().choices[0].finish_reason
    assert time.monotonic() - started_s < 30


@pytest.mark.parametrize(
    "body",
    [
        b"[" * 20_000,
        b'{"model": "\xff"}',
        b'{"temperature": NaN}',
        b'{"prompt": "a", "top_k": 1e999}',
    ],
    ids=["deep", "not UTF-8", "NaN", "infinite"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/tokenize"])
def test_bytes_that_are_no_request_are_400(app, path, body):
    headers = {"content-type": "application/json"}
    reply = httpx.post(f"{app.http_url}{path}", content=body, headers=headers, timeout=30)
    assert reply.status_code == 400
    assert reply.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/invocations", "/v1/chat/completions/batch"])
def test_routes_that_do_not_know_our_field_are_not_served(app, path):
    assert httpx.post(f"{app.http_url}{path}", json={}, timeout=30).status_code == 404


def test_a_schema_that_nothing_satisfies_is_400(chat):
    schema = {"name": "s", "schema": {"$ref": "#"}}
    with pytest.raises(openai.BadRequestError) as caught:
        chat(response_format={"type": "json_schema", "json_schema": schema})
    assert caught.value.param == "structured_outputs"


def test_a_flood_of_messages_stops_nobody(app):
    """Refused before they are validated one by one in the event loop."""
    body = {"model": "demo", "messages": [{"role": "user", "content": "a"}] * 100_000}
    started_s = time.monotonic()
    reply = httpx.post(f"{app.http_url}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 400
    assert "too large" in reply.json()["error"]["message"]  # not: too many tokens
    assert time.monotonic() - started_s < 30


def test_a_costly_protect_is_answered_like_any_other(app):
    body = {
        "model": "demo", "prompt": "a" * 8000, "max_tokens": 1,
        "specprefill": {"keep": 0.5, "protect": ["a"] * 64},
    }  # fmt: skip
    started_s = time.monotonic()
    reply = httpx.post(f"{app.http_url}/v1/completions", json=body, timeout=120)
    assert reply.status_code == 200, reply.text
    assert reply.json()["specprefill"]["reason"] == "protected_spans"
    assert time.monotonic() - started_s < 60  # most of it is the dense prefill


# --- text mode ------------------------------------------------------------------------------


def test_what_is_kept_can_be_sent_as_text(chat, long_prompt):
    answer = chat(extra_body={"specprefill": {"keep": KEEP, "mode": "text"}})
    assert answer.choices[0].finish_reason in {"stop", "length"}
    assert answer.usage.prompt_tokens == long_prompt.prompt_tokens
    report = answer.specprefill
    assert (report["plan"], report["mode"]) == ("prune", "text")
    assert 0 < report["text_tokens"] < 0.6 * long_prompt.prompt_tokens
    assert report["prefilled_by"] == "prefill"
    assert not report["recomputed"]
    assert chat().specprefill["mode"] == "positions"
