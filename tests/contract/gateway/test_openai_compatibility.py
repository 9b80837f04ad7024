"""The promises of vLLM's own tests of its OpenAI server, checked over our pipeline.

Each test states in our words what a test below vLLM's `tests/entrypoints` asserts. Those that need
a model's real answers stand in `tests/e2e/test_openai_answers.py`; those that do not apply are
listed, with the reason, in `docs/openai-compatibility.md`.
"""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest

from tests.contract.conftest import CHAT, TEXT, WORDS, sampling

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "what is 1+1?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "unit": {"enum": ["C", "F"]}},
    "required": ["city"],
}
TOOL = {"type": "function", "function": {"name": "get_weather", "parameters": PARAMETERS}}


async def refused(call: Any, status: int = 400) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        await call
    assert caught.value.status_code == status, caught.value
    return caught.value


# --- models, health, version ----------------------------------------------------------------


async def test_models_lists_the_served_one(client: openai.AsyncOpenAI) -> None:
    (model,) = (await client.models.list()).data
    assert (model.id, model.object, model.owned_by) == ("demo", "model", "vllm")
    assert model.model_extra["max_model_len"] == 2048


async def test_the_version_is_vllms(http: httpx.AsyncClient) -> None:
    import vllm

    assert (await http.get("/version")).json() == {"version": vllm.__version__}


async def test_a_request_id_comes_back(http: httpx.AsyncClient) -> None:
    headers = {"x-request-id": "my-own-id"}
    answer = await http.post("/v1/chat/completions", json=CHAT, headers=headers)
    assert answer.headers["x-request-id"] == "my-own-id"
    assert "my-own-id" in answer.json()["id"]
    without = await http.post("/v1/chat/completions", json=CHAT)
    assert without.headers["x-request-id"]


# --- chat -----------------------------------------------------------------------------------


async def test_a_session_of_several_turns(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    first = await client.chat.completions.create(model="demo", messages=MESSAGES)
    message = first.choices[0].message
    assert (message.role, first.object) == ("assistant", "chat.completion")
    usage = first.usage
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": message.content},
        {"role": "user", "content": "and in JSON?"},
    ]
    await client.chat.completions.create(model="demo", messages=turns)
    assert len(pipeline.requests[1].prompt) > len(pipeline.requests[0].prompt)


async def test_the_roles_of_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(model="demo", messages=MESSAGES, stream=True)
    events = [event async for event in stream]
    assert {event.object for event in events} == {"chat.completion.chunk"}
    assert len({event.id for event in events}) == 1
    assert events[0].choices[0].delta.role == "assistant"
    reasons = [event.choices[0].finish_reason for event in events]
    assert reasons == [None] * (len(events) - 1) + ["stop"]


async def test_a_stream_ends_with_done(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.text.endswith("data: [DONE]\n\n")


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}])
async def test_a_stream_has_no_usage_unless_asked(
    client: openai.AsyncOpenAI,
    options: Any,
) -> None:
    more = {} if options is None else {"stream_options": options}
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True, **more
    )
    assert [event.usage async for event in stream if event.usage is not None] == []


async def test_usage_goes_along_with_every_chunk(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="demo", messages=MESSAGES, stream=True,
        stream_options={"include_usage": True, "continuous_usage_stats": True},
    )  # fmt: skip
    events = [event async for event in stream]
    counts = [event.usage.completion_tokens for event in events]
    assert counts == sorted(counts)
    assert counts[-1] == len(WORDS)
    assert events[-1].choices == []
    for event in events:
        usage = event.usage
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("options", [{"include_usage": True}, {"include_usage": None}])
async def test_stream_options_without_a_stream_are_refused(
    http: httpx.AsyncClient,
    path: str,
    options: dict[str, Any],
) -> None:
    body = {**CHAT, "prompt": "hello", "stream_options": options}
    answer = await http.post(path, json=body)
    assert answer.status_code == 400
    assert "stream" in answer.json()["error"]["message"]


@pytest.mark.parametrize(("asked", "got"), [(0, 0), (1, 1), (2, 2)])
async def test_so_many_top_logprobs(client: openai.AsyncOpenAI, asked: int, got: int) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=MESSAGES, logprobs=True, top_logprobs=asked
    )
    content = answer.choices[0].logprobs.content
    assert len(content) == len(WORDS)
    assert {len(entry.top_logprobs) for entry in content} == {got}


async def test_no_logprobs_unless_asked(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES, logprobs=False)
    assert answer.choices[0].logprobs is None


@pytest.mark.parametrize("stream", [False, True])
async def test_too_many_logprobs_are_refused_and_the_next_request_is_served(
    client: openai.AsyncOpenAI,
    stream: bool,
) -> None:
    error = await refused(
        client.chat.completions.create(
            model="demo", messages=MESSAGES, logprobs=True, top_logprobs=21, stream=stream
        )
    )
    assert "20" in str(error)
    error = await refused(
        client.completions.create(model="demo", prompt=[5], logprobs=21, stream=stream)
    )
    answer = await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert answer.choices[0].message.content == TEXT


async def test_top_logprobs_need_logprobs(client: openai.AsyncOpenAI) -> None:
    await refused(client.chat.completions.create(model="demo", messages=MESSAGES, top_logprobs=2))


async def test_unknown_fields_are_ignored(client: openai.AsyncOpenAI) -> None:
    extra = {"extra_field": "0"}
    answer = await client.chat.completions.create(
        model="demo", messages=[{**MESSAGES[1], **extra}], extra_body=extra
    )
    assert answer.choices[0].message.content == TEXT


@pytest.mark.parametrize(
    "content",
    [
        [{"type": "text", "text": "what is"}, {"type": "text", "text": "1+1?"}],
        [{"type": "text", "text": "what is 1+1?"}],
        "what is 1+1?",
    ],
)
async def test_content_may_come_in_parts(
    client: openai.AsyncOpenAI,
    pipeline: Any,
    gateway: Any,
    content: Any,
) -> None:
    await client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}]
    )
    text = gateway[0].renderer.tokenizer.decode(pipeline.requests[0].prompt)
    assert "what is" in text
    assert "1+1?" in text


async def test_images_are_refused(client: openai.AsyncOpenAI) -> None:
    part = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    await refused(
        client.chat.completions.create(model="demo", messages=[{"role": "user", "content": [part]}])
    )


@pytest.mark.parametrize("tokens", ["max_tokens", "max_completion_tokens"])
async def test_both_names_of_the_limit(
    client: openai.AsyncOpenAI,
    pipeline: Any,
    tokens: str,
) -> None:
    await client.chat.completions.create(model="demo", messages=MESSAGES, **{tokens: 7})
    assert sampling(pipeline)["max_tokens"] == 7


async def test_without_a_limit_the_rest_of_the_context_is_the_limit(
    client: openai.AsyncOpenAI,
    pipeline: Any,
) -> None:
    await client.chat.completions.create(model="demo", messages=MESSAGES)
    asked = pipeline.requests[0]
    assert sampling(pipeline)["max_tokens"] == 2048 - len(asked.prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -2},
        {"min_p": 1.5},
        {"presence_penalty": 2.1},
        {"frequency_penalty": -2.1},
        {"repetition_penalty": 0.0},
        {"n": 0},
        {"max_tokens": 0},
        {"max_tokens": -1},
        {"seed": 2**64},
        {"seed": -(2**64)},
        {"prompt_logprobs": -2},
        {"min_tokens": -1},
        {"min_tokens": 9, "max_tokens": 8},
        {"stop_token_ids": [99_999]},
        {"logit_bias": {"99999": 1.0}},
        {"logit_bias": {"-1": 1.0}},
        {"logit_bias": {"a": 1.0}},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [99_999]},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "nothing"}},
        {"structured_outputs": {"regex": "[a", "choice": ["b"]}},
        {"structured_outputs": {"json": 42}},
        {"tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "none"}}},
        {"tools": [TOOL], "tool_choice": {"function": {"name": "get_weather"}}},
        {"tools": [TOOL], "tool_choice": "sometimes"},
        {"tools": [{"type": "function"}]},
        {"tool_choice": "required"},
        {"messages": "hello"},
        {"messages": None},
        {"messages": [{"role": "user", "content": 3}]},
        {"messages": [{"content": "hello"}]},
        {"stream": "perhaps"},
        {"continue_final_message": True, "add_generation_prompt": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
async def test_what_vllm_refuses_is_refused_with_400_before_the_pipeline(
    http: httpx.AsyncClient,
    pipeline: Any,
    fields: dict[str, Any],
    stream: bool,
) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, "stream": stream, **fields})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    assert error["message"]
    assert pipeline.requests == []


@pytest.mark.parametrize("body", ["[]", "null", "3", '"x"', "", "{", '{"a": }', "[{}]"])
@pytest.mark.parametrize(
    "path", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize"]
)
async def test_a_body_that_is_no_object_is_400(
    http: httpx.AsyncClient,
    path: str,
    body: str,
) -> None:
    headers = {"content-type": "application/json"}
    answer = await http.post(path, content=body, headers=headers)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["message"]


async def test_tool_choice_null_means_its_default(
    client: openai.AsyncOpenAI,
    pipeline: Any,
) -> None:
    answer = await client.chat.completions.create(
        model="demo", messages=MESSAGES, extra_body={"tool_choice": None}
    )
    assert answer.choices[0].message.content == TEXT


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"response_format": {"type": "json_object"}}, "json_object"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "s", "schema": PARAMETERS},
                }
            },
            "json",
        ),
        ({"structured_outputs": {"regex": "[ab]+"}}, "regex"),
        ({"structured_outputs": {"choice": ["a", "b"]}}, "grammar"),
        ({"structured_outputs": {"json": PARAMETERS}}, "json"),
    ],
)
async def test_a_format_reaches_the_engine(
    http: httpx.AsyncClient,
    pipeline: Any,
    fields: dict[str, Any],
    kind: str,
) -> None:
    answer = await http.post("/v1/chat/completions", json={**CHAT, **fields})
    assert answer.status_code == 200, answer.text
    assert sampling(pipeline)["structured_outputs"][kind] is not None


async def test_an_unknown_model_is_404_everywhere(http: httpx.AsyncClient) -> None:
    bodies = {
        "/v1/chat/completions": {"messages": MESSAGES},
        "/v1/completions": {"prompt": "x"},
        "/v1/responses": {"input": "x"},
        "/tokenize": {"prompt": "x"},
        "/detokenize": {"tokens": [5]},
    }
    for path, body in bodies.items():
        answer = await http.post(path, json={**body, "model": "none"})
        assert (path, answer.status_code) == (path, 404)
        assert "none" in answer.json()["error"]["message"]
