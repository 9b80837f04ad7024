"""The promises of vLLM's own tests of its other routes, checked over our pipeline.

Completions, tokens, responses and messages; chat is in `test_openai_compatibility.py`, which also
refers to the rest of vLLM's tests.
"""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any, Self

import anthropic
import httpx
import httpx2
import openai
import pytest
from msgspec import structs

from specprefill.core.types import Chunk, Request, TokenLogprob
from tests.contract.conftest import TEXT, WORDS, sampling

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


# --- completions ----------------------------------------------------------------------------


async def test_a_completion_of_token_ids(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await client.completions.create(model="demo", prompt=[5, 6, 7], max_tokens=5)
    assert (answer.object, answer.choices[0].text) == ("text_completion", TEXT)
    assert answer.usage.prompt_tokens == 3
    assert pipeline.requests[0].prompt == (5, 6, 7)


async def test_a_batch_of_token_id_prompts(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await client.completions.create(model="demo", prompt=[[5, 6], [7, 8, 9]], n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {request.prompt for request in pipeline.requests} == {(5, 6), (7, 8, 9)}
    assert answer.usage.prompt_tokens == 5


async def test_a_streamed_batch_labels_its_choices(client: openai.AsyncOpenAI) -> None:
    texts: dict[int, str] = {}
    stream = await client.completions.create(model="demo", prompt=["a", "b"], stream=True)
    async for event in stream:
        (choice,) = event.choices
        texts[choice.index] = texts.get(choice.index, "") + choice.text
    assert texts == {0: TEXT, 1: TEXT}


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_puts_the_prompt_before_the_answer(
    client: openai.AsyncOpenAI,
    stream: bool,
) -> None:
    answer = await client.completions.create(model="demo", prompt="hello", echo=True, stream=stream)
    events = [event async for event in answer] if stream else [answer]
    assert "".join(event.choices[0].text for event in events) == "hello" + TEXT


@pytest.mark.parametrize(("asked", "got"), [(0, {1}), (2, {2})])
async def test_so_many_logprobs_of_a_completion(
    client: openai.AsyncOpenAI,
    asked: int,
    got: set[int],
) -> None:
    answer = await client.completions.create(model="demo", prompt=[5], logprobs=asked)
    logprobs = answer.choices[0].logprobs
    assert {len(each) for each in logprobs.top_logprobs} == got
    assert logprobs.token_logprobs == [-0.25] * 3
    assert logprobs.text_offset == [0, len(WORDS[0]), len(WORDS[0] + WORDS[1])]


async def test_the_stream_of_each_sample_begins_with_the_prompts_logprobs(
    client: openai.AsyncOpenAI, pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = pipeline._script

    def with_prompt_logprobs(request: Request) -> Iterator[Chunk]:
        first, *more = script(request)
        logprobs = [(TokenLogprob(token, -0.5, 1, "x"),) for token in request.prompt[1:]]
        yield structs.replace(first, prompt_logprobs=(None, *logprobs))
        yield from more

    monkeypatch.setattr(pipeline, "_script", with_prompt_logprobs)
    asked: dict[str, Any] = {"prompt": "a b c", "echo": True, "logprobs": 1, "n": 2}
    whole = await client.completions.create(model="demo", **asked)
    seen = {choice.index: _Logprobs() for choice in whole.choices}
    async for event in await client.completions.create(model="demo", **asked, stream=True):
        for choice in event.choices:
            seen[choice.index].add(choice)
    assert seen == {choice.index: _Logprobs().add(choice) for choice in whole.choices}
    tokens = len(pipeline.requests[-1].prompt)
    assert seen[1].logprobs == [None, *[-0.5] * (tokens - 1), *[-0.25] * len(WORDS)]


@dataclass
class _Logprobs:
    """What the events of one choice hold together."""

    text: str = ""
    logprobs: list[float | None] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)

    def add(self, choice: Any) -> Self:
        self.text += choice.text
        self.logprobs += choice.logprobs.token_logprobs
        self.offsets += choice.logprobs.text_offset
        return self


@pytest.mark.parametrize("prompt", ["", [], None, [[]], [99_999], [-1]])
async def test_a_prompt_that_is_none_is_400(
    http: httpx.AsyncClient,
    pipeline: Any,
    prompt: Any,
) -> None:
    answer = await http.post("/v1/completions", json={"model": "demo", "prompt": prompt})
    assert answer.status_code == 400, answer.text
    assert pipeline.requests == []


async def test_truncation_takes_the_side_that_is_asked_for(
    client: openai.AsyncOpenAI,
    pipeline: Any,
) -> None:
    for side, kept in (("left", (9, 10, 11, 12)), ("right", (5, 6, 7, 8))):
        extra = {"truncate_prompt_tokens": 4, "truncation_side": side}
        await client.completions.create(
            model="demo", prompt=list(range(5, 13)), max_tokens=1, extra_body=extra
        )
        assert pipeline.requests[-1].prompt == kept


async def test_token_ids_come_back_where_asked(client: openai.AsyncOpenAI) -> None:
    extra = {"return_token_ids": True}
    answer = await client.completions.create(model="demo", prompt=[5, 6], extra_body=extra)
    assert answer.choices[0].model_extra["token_ids"] == [300, 301, 302]
    assert answer.choices[0].model_extra["prompt_token_ids"] == [5, 6]
    without = await client.completions.create(model="demo", prompt=[5, 6])
    assert without.choices[0].model_extra.get("token_ids") is None


async def test_a_suffix_is_refused(client: openai.AsyncOpenAI) -> None:
    await refused(client.completions.create(model="demo", prompt="a", suffix="b"))


# --- tokenize and detokenize ----------------------------------------------------------------


async def test_tokens_of_a_prompt_and_back(http: httpx.AsyncClient, demo_tokenizer: Any) -> None:
    body = {"model": "demo", "prompt": "vllm test prompt", "return_token_strs": True}
    answer = (await http.post("/tokenize", json=body)).json()
    assert answer["tokens"] == demo_tokenizer.encode("vllm test prompt")
    assert (answer["count"], answer["max_model_len"]) == (len(answer["tokens"]), 2048)
    assert answer["token_strs"] == demo_tokenizer.convert_ids_to_tokens(answer["tokens"])
    body = {"model": "demo", "tokens": answer["tokens"]}
    assert (await http.post("/detokenize", json=body)).json() == {"prompt": "vllm test prompt"}


@pytest.mark.parametrize("generation", [True, False])
async def test_tokens_of_a_conversation(
    http: httpx.AsyncClient,
    demo_tokenizer: Any,
    generation: bool,
) -> None:
    body = {"model": "demo", "messages": MESSAGES, "add_generation_prompt": generation}
    answer = (await http.post("/tokenize", json=body)).json()
    expected = demo_tokenizer.apply_chat_template(
        MESSAGES, add_generation_prompt=generation, return_dict=False
    )
    assert answer["tokens"] == expected


async def test_a_final_message_is_continued(http: httpx.AsyncClient) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "It is"}]
    body = {
        "model": "demo", "messages": messages,
        "add_generation_prompt": False, "continue_final_message": True,
    }  # fmt: skip
    tokens = (await http.post("/tokenize", json=body)).json()["tokens"]
    text = (await http.post("/detokenize", json={"model": "demo", "tokens": tokens})).json()
    assert text["prompt"].endswith("It is")


# --- responses ------------------------------------------------------------------------------


async def test_a_response(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    answer = await client.responses.create(
        model="demo", input="what is 1+1?", instructions="be brief", max_output_tokens=9
    )
    assert (answer.status, answer.object, answer.output_text) == ("completed", "response", TEXT)
    assert answer.usage.output_tokens == len(WORDS)
    assert sampling(pipeline)["max_tokens"] == 9


async def test_the_events_of_a_streamed_response(client: openai.AsyncOpenAI) -> None:
    stream = await client.responses.create(model="demo", input="hello", stream=True)
    events = [event async for event in stream]
    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == TEXT
    numbers = [event.sequence_number for event in events]
    assert numbers == sorted(set(numbers))


async def test_a_conversation_as_input(client: openai.AsyncOpenAI, pipeline: Any) -> None:
    await client.responses.create(model="demo", input=MESSAGES)
    prompt = pipeline.requests[0].prompt
    await client.chat.completions.create(model="demo", messages=MESSAGES)
    assert pipeline.requests[1].prompt == prompt


async def test_an_unknown_response_is_404(client: openai.AsyncOpenAI) -> None:
    await refused(client.responses.retrieve("resp_none"), 404)
    await refused(client.responses.cancel("resp_none"), 404)


# --- messages -------------------------------------------------------------------------------


@pytest.fixture
async def claude(gateway: Any, pipeline: Any) -> AsyncIterator[anthropic.AsyncAnthropic]:
    transport = httpx2.ASGITransport(gateway[1])
    async with anthropic.AsyncAnthropic(
        auth_token="test-key", base_url="http://x", max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
    ) as made:  # fmt: skip
        yield made


ASKED: dict[str, Any] = {
    "model": "demo", "max_tokens": 8, "messages": [{"role": "user", "content": "how are you?"}],
}  # fmt: skip


async def test_a_message(claude: anthropic.AsyncAnthropic, pipeline: Any) -> None:
    answer = await claude.messages.create(**ASKED, system="be brief")
    assert (answer.role, answer.type, answer.stop_reason) == ("assistant", "message", "end_turn")
    assert answer.content[0].text == TEXT
    assert answer.usage.input_tokens > 0
    assert answer.usage.output_tokens == len(WORDS)
    assert sampling(pipeline)["max_tokens"] == 8


async def test_the_events_of_a_streamed_message(claude: anthropic.AsyncAnthropic) -> None:
    async with claude.messages.stream(**ASKED) as stream:
        text = "".join([piece async for piece in stream.text_stream])
        final = await stream.get_final_message()
    assert text == TEXT
    assert final.stop_reason == "end_turn"


async def test_tokens_of_a_message_are_counted(claude: anthropic.AsyncAnthropic) -> None:
    counted = await claude.messages.count_tokens(model="demo", messages=ASKED["messages"])
    answer = await claude.messages.create(**ASKED)
    usage = answer.usage  # what a cache had is counted apart
    assert counted.input_tokens == usage.input_tokens + usage.cache_read_input_tokens


async def test_a_refused_message_is_no_error_of_the_servers(
    claude: anthropic.AsyncAnthropic,
) -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logger = logging.getLogger("vllm.entrypoints.anthropic.api_router")
    logger.addHandler(handler)
    with pytest.raises(anthropic.BadRequestError):
        await claude.messages.create(**ASKED, extra_body={"temperature": -1})
    logger.removeHandler(handler)
    (record,) = records
    assert (record.levelname, record.exc_info) == ("INFO", None)
    assert "temperature must be non-negative" in record.getMessage()


# --- what clients cannot reach --------------------------------------------------------------


async def test_no_route_of_another_task_is_there(http: httpx.AsyncClient) -> None:
    for path in ("/v1/embeddings", "/pooling", "/classify", "/score", "/rerank", "/v1/rerank"):
        assert (path, (await http.post(path, json={})).status_code) == (path, 404)


async def test_errors_are_json_on_every_route(http: httpx.AsyncClient) -> None:
    for path in ("/v1/chat/completions", "/v1/completions", "/tokenize", "/detokenize"):
        answer = await http.post(path, json={"model": "demo"})
        assert answer.status_code == 400, path
        assert json.loads(answer.text)["error"]["code"] is not None
