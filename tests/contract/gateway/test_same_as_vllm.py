"""The gateway's answers beside those of vLLM's own server: the same bodies, good and bad.

Both are vLLM's OpenAI app in this process. One is built as `vllm serve` builds it, over an engine
that admits requests as vLLM's does and answers the scripted pipeline's words; the other is the
gateway. Whatever differs must be named in `EXPLAINED`; docs/compatibility.md explains why.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest

from specprefill.core.types import Request
from specprefill.gateway.openai.routes import SERVED
from tests.contract.conftest import API_KEY, ScriptedPipeline, configuration
from tests.contract.gateway.test_gateway_bytes import BODIES, FIELDS, NO_JSON

pytestmark = pytest.mark.filterwarnings("ignore:max_tokens is deprecated:DeprecationWarning")

# Chosen at random, or by the clock, in every answer.
_RANDOM = re.compile(
    r"(chatcmpl|cmpl|resp|msg|rs|chatcmpl-tool|call|modelperm)[-_][0-9a-f]{8,}(-\d+)?|[0-9a-f]{32}"
)
_CLOCK = frozenset(("created", "created_at", "completed_at"))
# Headers whose values are a request's own.
_OWN_HEADERS = frozenset(("content-length", "x-request-id"))
CHAT_MESSAGES = [{"role": "user", "content": "hello"}]


@dataclass(frozen=True)
class Sent:
    """One request."""

    method: str
    path: str
    body: bytes = b""
    kind: str | None = "application/json"

    def __str__(self) -> str:
        return f"{self.method} {self.path} {self.body[:200]!r}"


@dataclass(frozen=True)
class Got:
    """The parts of an answer that a client depends on."""

    status: int
    headers: frozenset[tuple[str, str]]
    body: Any

    @property
    def error(self) -> Any:
        return self.body.get("error") if isinstance(self.body, dict) else None


# --- the two servers --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(gateway: Any) -> Iterator[Any]:
    """vLLM's own app."""
    from typing_extensions import override
    from vllm.config import VllmConfig
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.entrypoints.launchers.api_server.app_state import init_app_state
    from vllm.entrypoints.launchers.app import build_app
    from vllm.outputs import RequestOutput
    from vllm.renderers import renderer_from_config
    from vllm.v1.engine.input_processor import InputProcessor

    from specprefill.gateway.openai.request_outputs import OutputAssembler
    from specprefill.gateway.openai.server import server_args
    from specprefill.gateway.openai.surface import TASKS, RemoteEngineClient

    class PlainEngine(RemoteEngineClient):
        def __init__(self, vllm_config: VllmConfig) -> None:
            self.vllm_config = vllm_config
            self.model_config = vllm_config.model_config
            self.renderer = renderer_from_config(vllm_config)
            self.input_processor = InputProcessor(vllm_config, self.renderer)
            self._pipeline = ScriptedPipeline()

        @override
        async def generate(
            self, prompt: Any, sampling_params: Any, request_id: str, **more: Any
        ) -> AsyncGenerator[RequestOutput, None]:
            admitted = self.input_processor.process_inputs(
                request_id, prompt, sampling_params, supported_tasks=TASKS
            )
            ids = tuple(admitted.prompt_token_ids)
            sampling = msgspec_packed(admitted.sampling_params)
            text = more.get("prompt_text") or prompt.get("prompt")
            made = OutputAssembler(
                request_id, text, list(ids), sampling_params.n, sampling_params.output_kind
            )
            request = Request(request_id, ids, sampling, samples=sampling_params.n)
            async for chunk in self._pipeline.generate(request):
                output = made.add(chunk)
                if output is not None:
                    yield output

    import msgspec

    def msgspec_packed(params: Any) -> bytes:
        return msgspec.msgpack.encode(params)

    args = server_args(configuration())
    engine_args = AsyncEngineArgs.from_cli_args(args)
    engine = PlainEngine(
        VllmConfig(
            model_config=engine_args.create_model_config(),
            structured_outputs_config=engine_args.create_structured_outputs_config(),
        )
    )
    app = build_app(args, TASKS, engine.model_config)
    asyncio.run(init_app_state(engine, app.state, args, TASKS))
    app.state.server = type("Server", (), {"should_exit": False})()
    yield app
    engine.renderer.shutdown()


@pytest.fixture
async def servers(
    gateway: Any, plain: Any, pipeline: Any, health: Any
) -> AsyncIterator[tuple[httpx.AsyncClient, httpx.AsyncClient]]:
    """Plain vLLM and the gateway."""
    apps = [httpx.ASGITransport(app, raise_app_exceptions=False) for app in (plain, gateway[1])]
    key = {"authorization": f"Bearer {API_KEY}"}
    async with (
        httpx.AsyncClient(transport=apps[0], base_url="http://x", headers=key) as vllm,
        httpx.AsyncClient(transport=apps[1], base_url="http://x", headers=key) as ours,
    ):
        yield vllm, ours


async def got(client: httpx.AsyncClient, sent: Sent) -> Got:
    headers = {} if sent.kind is None else {"content-type": sent.kind}
    reply = await client.request(sent.method, sent.path, content=sent.body, headers=headers)
    headers_got = frozenset(
        (name, "" if name in _OWN_HEADERS else value) for name, value in reply.headers.items()
    )
    return Got(reply.status_code, headers_got, _settled(_read(reply)))


def _read(reply: httpx.Response) -> Any:
    kind = reply.headers.get("content-type", "")
    if kind.startswith("text/event-stream"):
        lines = [line for line in reply.text.split("\n") if line]
        events = [json.loads(line[6:]) if line.startswith("data: {") else line for line in lines]
        return sorted(events, key=_choice)
    if kind.startswith("application/json") and reply.content:
        return reply.json()
    return reply.text


def _choice(event: Any) -> int:
    """Prompts and samples of one stream come as they are ready: each in order."""
    choices = event.get("choices") if isinstance(event, dict) else None
    return int(choices[0]["index"]) if choices else 1_000_000


def _settled(value: Any) -> Any:
    """Without random values, times, our report, and the request's id that our errors have."""
    if isinstance(value, dict):
        ours = {"specprefill", "request_id"} if "error" in value else {"specprefill"}
        return {
            name: 0 if name in _CLOCK else _settled(each)
            for name, each in value.items()
            if name not in ours
        }
    if isinstance(value, list):
        return [_settled(each) for each in value]
    return _RANDOM.sub("*", value) if isinstance(value, str) else value


# --- what is sent -----------------------------------------------------------------------------

VALUES = [-1, None, "x", [], {"a": None}]
GOOD: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {"messages": CHAT_MESSAGES},
        {"messages": [{"role": "system", "content": "s"}, *CHAT_MESSAGES], "max_tokens": 2},
        {"messages": CHAT_MESSAGES, "stream": True},
        {"messages": CHAT_MESSAGES, "stream": True, "stream_options": {"include_usage": True}},
        {"messages": CHAT_MESSAGES, "n": 3, "seed": 1},
        {"messages": CHAT_MESSAGES, "n": 2, "stream": True},
        {"messages": CHAT_MESSAGES, "logprobs": True, "top_logprobs": 2},
        {"messages": CHAT_MESSAGES, "stop": ["###"], "temperature": 0},
        {"messages": CHAT_MESSAGES, "return_token_ids": True},
        {"messages": CHAT_MESSAGES, "response_format": {"type": "json_object"}},
        {"messages": CHAT_MESSAGES, "tools": [{"type": "function", "function": {"name": "f"}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}]},
        {"messages": CHAT_MESSAGES, "echo": True},
        {"messages": [{"role": "assistant", "content": "a"}], "add_generation_prompt": False},
        {"messages": [*CHAT_MESSAGES, {"role": "assistant", "content": "a"}],
         "continue_final_message": True, "add_generation_prompt": False},
    ],
    "/v1/completions": [
        {"prompt": "hello"}, {"prompt": ["a", "b c"]}, {"prompt": [5, 6, 7]},
        {"prompt": [[5, 6], [7]]}, {"prompt": "hello", "stream": True}, {"prompt": "a", "n": 2},
        {"prompt": "a", "logprobs": 2}, {"prompt": "a", "echo": True},
        {"prompt": "a", "suffix": ""},
        {"prompt": ["a", "b"], "stream": True, "n": 2}, {"prompt": "a", "max_tokens": 1},
        {"prompt": "a", "stream": True, "stream_options": {"include_usage": True}},
    ],
    "/v1/responses": [
        {"input": "hello"}, {"input": CHAT_MESSAGES},
        {"input": "hello", "instructions": "be brief"},
        {"input": "hello", "stream": True}, {"input": "hello", "max_output_tokens": 3},
        {"input": "hello", "store": False}, {"input": "hello", "temperature": 0.0},
    ],
    "/v1/messages": [
        {"messages": CHAT_MESSAGES, "max_tokens": 3},
        {"messages": CHAT_MESSAGES, "max_tokens": 3, "system": "be brief"},
        {"messages": CHAT_MESSAGES, "max_tokens": 3, "stream": True},
        {"messages": CHAT_MESSAGES, "max_tokens": 3, "stop_sequences": ["###"]},
    ],
    "/v1/messages/count_tokens": [{"messages": CHAT_MESSAGES}],
    "/tokenize": [
        {"prompt": "hello"}, {"messages": CHAT_MESSAGES},
        {"prompt": "a", "return_token_strs": True},
    ],
    "/detokenize": [{"tokens": [5, 6]}, {"tokens": []}],
}  # fmt: skip
BAD: dict[str, list[dict[str, Any]]] = {
    "/v1/chat/completions": [
        {}, {"messages": []}, {"messages": [{"role": "none", "content": "a"}]},
        {"messages": CHAT_MESSAGES, "max_tokens": 0}, {"messages": CHAT_MESSAGES, "n": 0},
        {"messages": [{"role": "user", "content": "long " * 4000}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        {"messages": CHAT_MESSAGES, "response_format": {"type": "json_schema"}},
        {"messages": CHAT_MESSAGES, "structured_outputs": {"regex": "("}},
        {"messages": CHAT_MESSAGES, "logit_bias": {"x": 1}},
        {"messages": CHAT_MESSAGES, "logit_bias": {"999999": 1}},
        {"messages": CHAT_MESSAGES, "logit_bias": {"999999": 1}, "stream": True},
        {"messages": CHAT_MESSAGES, "tool_choice": "auto"},
        {"messages": CHAT_MESSAGES, "tools": []},
        {"messages": CHAT_MESSAGES, "stream_options": {"include_usage": True}},
        {"messages": CHAT_MESSAGES, "min_tokens": 9, "max_tokens": 3},
        {"messages": CHAT_MESSAGES, "stop_token_ids": ["a"]},
        {"messages": CHAT_MESSAGES, "use_beam_search": True},
    ],
    "/v1/completions": [
        {}, {"prompt": ""}, {"prompt": []}, {"prompt": [[]]}, {"prompt": [999999]},
        {"prompt": [-1]}, {"prompt": ["a", 5]}, {"prompt": [20] * 3000}, {"prompt": {"a": 1}},
        {"prompt": "a", "use_beam_search": True}, {"prompt": [20] * 3000, "stream": True},
    ],
    "/v1/responses": [{}, {"input": []}, {"input": [{"role": "x"}]}, {"input": 7},
                      {"input": "a", "previous_response_id": "resp_none"},
                      {"input": "a", "logit_bias": {"999999": 1}},
                      {"input": "a", "logit_bias": {"999999": 1}, "stream": True}],
    "/v1/messages": [{}, {"messages": []}, {"messages": CHAT_MESSAGES}, {"max_tokens": 3},
                     {"messages": CHAT_MESSAGES, "max_tokens": 0}],
    "/tokenize": [{}, {"prompt": 7}, {"messages": 7}], "/detokenize": [{}, {"tokens": ["a"]}],
}  # fmt: skip
OTHERS = [
    Sent("GET", "/v1/models"), Sent("GET", "/version"), Sent("GET", "/ping"), Sent("GET", "/none"),
    Sent("POST", "/v1/none", b"{}"), Sent("GET", "/v1/chat/completions"), Sent("GET", "/load"),
    Sent("POST", "/invocations", b'{"prompt": "a"}'), Sent("DELETE", "/v1/models"),
    Sent("GET", "/v1/responses/resp_none"),
    Sent("POST", "/v1/responses/resp_none/cancel"), Sent("OPTIONS", "/v1/models"),
    Sent("POST", "/v1/completions", b'{"prompt": "a"}', "text/plain"),
    Sent("POST", "/v1/completions", b'{"prompt": "a"}', None),
    Sent("POST", "/v1/completions", b'{"prompt": "a"}', "application/json; charset=utf-8"),
]  # fmt: skip


def requests() -> Iterator[Sent]:
    yield from OTHERS
    for bodies in (GOOD, BAD):
        for path, each in bodies.items():
            for body in each:
                for model in ({"model": "demo"}, {}):
                    yield Sent("POST", path, json.dumps({**model, **body}).encode())
    for path in GOOD:
        yield Sent("POST", path, json.dumps({"model": "other", **GOOD[path][0]}).encode())
        yield from (Sent("POST", path, body) for body in NO_JSON.values())
    for path, body in BODIES.items():
        for field in FIELDS:
            for value in VALUES:
                sent = {"model": "demo", **body, field: value}
                yield Sent("POST", path, json.dumps(sent).encode())


# --- what may differ --------------------------------------------------------------------------

Differs = Callable[[Sent, Got, Got], bool]


def _fields(sent: Sent) -> dict[str, Any]:
    try:
        fields = json.loads(sent.body)
    except (ValueError, RecursionError):
        return {}
    return fields if isinstance(fields, dict) else {}


def _message(answer: Got) -> str:
    return str(answer.error.get("message", "")) if isinstance(answer.error, dict) else ""


def _is_no_json(sent: Sent, vllm: Got, ours: Got) -> bool:
    """Both refuse; here before anything is read of it, with one text for every route."""
    messages = ("is not valid JSON", "nested too deeply")
    return 400 <= vllm.status < 500 and ours.status == 400 and any(
        each in _message(ours) for each in messages
    )  # fmt: skip


def _is_our_field(sent: Sent, vllm: Got, ours: Got) -> bool:
    """`specprefill` and its other spellings are read, hence checked."""
    ours_alone = {"specprefill", "speculative_prefill", "specprefill_keep_pct"}
    return ours.status == 400 and bool(ours_alone & _fields(sent).keys())


def _is_beam_search(sent: Sent, vllm: Got, ours: Got) -> bool:
    """Not supported: refused on every route, also where vLLM ignores the field."""
    return ours.status == 400 and bool(_fields(sent).get("use_beam_search"))


def _is_crash(sent: Sent, vllm: Got, ours: Got) -> bool:
    """vLLM's validators expect an object and fail with 500."""
    return vllm.status == 500 and ours.status == 400


def _is_anthropic_form(sent: Sent, vllm: Got, ours: Got) -> bool:
    """Anthropic's clients read Anthropic's errors; vLLM states some in OpenAI's form."""
    return (
        sent.path.startswith("/v1/messages")
        and vllm.status == ours.status
        and ours.body["type"] == "error"
        and _message(vllm) == _message(ours)
    )


def _is_bad_stream(sent: Sent, vllm: Got, ours: Got) -> bool:
    """A request refused before the first token has an error status, also with a stream."""
    return vllm.status == 200 and ours.status == 400 and _fields(sent).get("stream") is True


def _is_unserved(sent: Sent, vllm: Got, ours: Got) -> bool:
    """A route of vLLM's that is not served."""
    return ours.status == 404 and sent.path not in SERVED


EXPLAINED: dict[str, Differs] = {
    "no JSON": _is_no_json,
    "our field": _is_our_field,
    "beam search": _is_beam_search,
    "crash": _is_crash,
    "Anthropic's form": _is_anthropic_form,
    "bad stream": _is_bad_stream,
    "unserved": _is_unserved,
}


async def test_every_difference_is_explained(
    servers: tuple[httpx.AsyncClient, httpx.AsyncClient], pipeline: Any
) -> None:
    vllm, ours = servers
    explained: Counter[str] = Counter()
    unexplained = []
    total = 0
    for sent in requests():
        pipeline.reset()
        total += 1
        wanted, given = await got(vllm, sent), await got(ours, sent)
        if wanted == given:
            continue
        reasons = [name for name, holds in EXPLAINED.items() if holds(sent, wanted, given)]
        explained.update(reasons)
        if not reasons:
            unexplained.append((sent, wanted, given))
    assert unexplained == []
    assert explained.keys() == EXPLAINED.keys()  # an explanation of nothing is none
    assert total > 1000
