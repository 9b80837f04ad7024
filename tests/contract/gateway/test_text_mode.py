"""Text mode over HTTP and gRPC: from the request's field to the engines' prompt and the report."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import grpc
import httpx
import msgspec
import openai
import pytest

from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner, PromptModes
from specprefill.core.types import PromptMode
from specprefill.rpc import specprefill_pb2 as pb
from tests.contract.conftest import (
    API_KEY,
    JSON_LIMITS,
    KEYS,
    LIMIT,
    MAX_MESSAGE_BYTES,
    PLANNER,
    Call,
    ScriptedHealth,
    configuration,
    metrics_text,
)

MARK = "\n...\n"
LONG = "The quick brown fox jumps over the lazy dog. " * 40
SYSTEM = "Answer in one word."
TEXT_ONLY = PromptModes(PromptMode.TEXT, (PromptMode.TEXT,), "recurrent layers keep a state")
MESSAGES = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": LONG}]


class EndsPrefiller(FakePrefiller):
    """Remembers the engines' prompts."""

    def prefill(self, request: Any, selection: Any, timeout_s: float) -> Any:
        self.prompts = [*getattr(self, "prompts", ()), selection.engine_prompt(request.prompt)]
        return super().prefill(request, selection, timeout_s)


class EndsSpeculator(FakeSpeculator):
    """Keeps the protected spans and the last tokens, and nothing else."""

    async def select(self, request: Any, plan: Any, timeout_s: float) -> Any:
        from specprefill.core.protection import merge_spans
        from specprefill.core.types import Selection, Span

        await super().select(request, plan, timeout_s)
        tokens = len(request.prompt)
        ends = (Span(0, 30), Span(tokens - 20, tokens))
        return Selection(tokens, merge_spans((*request.protected, *ends)), plan)


@pytest.fixture(scope="module")
def prefiller() -> EndsPrefiller:
    return EndsPrefiller()


@pytest.fixture(scope="module")
def text_client(gateway: Any, prefiller: EndsPrefiller) -> Iterator[Any]:
    """A gateway's client over fake pools, whose pipeline writes text."""
    from specprefill.gateway.openai.server import build_client
    from specprefill.gateway.openai.text_writer import PromptTextWriter

    tokenizer = gateway[0].renderer.tokenizer
    texts = PromptTextWriter(tokenizer, MARK)
    pipeline = Pipeline(EndsSpeculator(), prefiller, FakeDecoder(), texts=texts)
    made = build_client(configuration(), pipeline, PLANNER)
    yield made
    made.renderer.shutdown()


@pytest.fixture
async def ask(text_client: Any) -> Any:
    """A function that asks over HTTP."""
    from specprefill.gateway.openai.server import build_http_app

    app = await build_http_app(
        configuration(), text_client, ScriptedHealth(), KEYS, LIMIT, metrics_text
    )
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    async with openai.AsyncOpenAI(
        api_key=API_KEY, base_url="http://x/v1", http_client=http, max_retries=0
    ) as client:

        async def asked(**controls: Any) -> Any:
            return await client.chat.completions.create(
                model="demo", messages=MESSAGES, max_tokens=4, extra_body={"specprefill": controls}
            )

        yield asked


@pytest.fixture
def grpc_api(text_client: Any) -> Any:
    from specprefill.gateway.grpc.api import GrpcApi
    from specprefill.gateway.openai.server import build_explainer

    explainer = build_explainer(configuration(), text_client)
    return GrpcApi(
        text_client, explainer, ("demo",), KEYS, LIMIT, ScriptedHealth(),
        max_message_bytes=MAX_MESSAGE_BYTES, json_limits=JSON_LIMITS,
    )  # fmt: skip


def generate_request(mode: str) -> pb.GenerateRequest:
    turns = [pb.Message(role=each["role"], content=each["content"]) for each in MESSAGES]
    return pb.GenerateRequest(
        conversation=pb.Conversation(messages=turns), prune=pb.Prune(keep=0.2, mode=mode)
    )


@pytest.mark.parametrize("mode", ["text", "positions"])
async def test_a_caller_chooses_the_mode_of_one_request(
    ask: Any, prefiller: EndsPrefiller, text_client: Any, mode: str
) -> None:
    answer = await ask(keep=0.2, mode=mode)
    report = answer.model_extra["specprefill"]
    assert (report["plan"], report["mode"]) == ("prune", mode)
    sent = prefiller.prompts[-1]
    text = text_client.renderer.tokenizer.decode(sent)
    assert answer.usage.prompt_tokens == report["prompt_tokens"] > len(sent)
    assert text.count(MARK) == (mode == "text")
    assert SYSTEM in text
    assert report.get("text_tokens") == (len(sent) if mode == "text" else None)
    assert text.endswith(text_client.renderer.tokenizer.decode(sent[-2:]))


async def test_the_templates_tokens_are_the_same_in_both_modes(
    ask: Any, prefiller: EndsPrefiller, text_client: Any
) -> None:
    for mode in ("positions", "text"):
        await ask(keep=0.2, mode=mode)
    kept, text = prefiller.prompts[-2:]
    special = set(text_client.renderer.tokenizer.all_special_ids)
    assert [t for t in text if t in special] == [t for t in kept if t in special]
    system = text_client.renderer.tokenizer.encode(SYSTEM, add_special_tokens=False)
    assert text[: len(system) + 2] == kept[: len(system) + 2]


async def test_grpc_has_the_mode_in_request_and_report(grpc_api: Any) -> None:
    answer = await grpc_api.generate(generate_request("text"), Call())
    decision = answer.report.decision
    assert (decision.plan, decision.mode) == ("prune", "text")
    assert 0 < decision.text_tokens < decision.prompt_tokens == answer.usage.prompt_tokens
    asked = generate_request("text")
    scored = await grpc_api.score(
        pb.ScoreRequest(conversation=asked.conversation, prune=asked.prune), Call()
    )
    assert (scored.decision.mode, scored.decision.text_tokens) == ("text", decision.text_tokens)
    dense = await grpc_api.generate(pb.GenerateRequest(text="short"), Call())
    assert dense.report.decision.mode == "dense"
    assert not dense.report.decision.HasField("text_tokens")


async def test_a_mode_that_the_model_cannot_have_is_refused_over_http_and_grpc(
    ask: Any, grpc_api: Any, text_client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specprefill.gateway.openai.failures import RpcFailed

    planner = Planner(enabled=True, keep=0.3, min_prompt_tokens=48, modes=TEXT_ONLY)
    monkeypatch.setattr(text_client, "_planner", planner)
    with pytest.raises(openai.BadRequestError) as refused:
        await ask(mode="positions")
    assert refused.value.param == "specprefill.mode"
    assert "recurrent layers keep a state" in refused.value.message
    call = Call()
    with pytest.raises(RpcFailed):
        await grpc_api.generate(generate_request("positions"), call)
    assert call.code is grpc.StatusCode.INVALID_ARGUMENT
    assert 'prune.mode: must be "text" here' in call.details
    report = (await ask(keep=0.2)).model_extra["specprefill"]
    assert report["mode"] == "text"


async def test_the_log_line_names_the_mode(ask: Any, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "specprefill"):
        await ask(keep=0.2, mode="text")
    assert "plan=prune reason=asked mode=text" in caplog.text


@pytest.fixture(scope="module")
def long_client(gateway: Any, prefiller: EndsPrefiller) -> Iterator[Any]:
    """A gateway whose text prompts may be longer than its model's 2048 tokens."""
    from specprefill.gateway.openai.server import build_client
    from specprefill.gateway.openai.text_writer import PromptTextWriter

    config = configuration()
    selection = config.selection.model_copy(update={"max_text_mode_len": 8192})
    texts = PromptTextWriter(gateway[0].renderer.tokenizer, MARK)
    pipeline = Pipeline(EndsSpeculator(), prefiller, FakeDecoder(), texts=texts)
    made = build_client(config.model_copy(update={"selection": selection}), pipeline, PLANNER)
    yield made
    made.renderer.shutdown()


async def prepared(client: Any, words: int, **controls: Any) -> Any:
    from vllm.sampling_params import SamplingParams

    from specprefill.core.types import Controls
    from specprefill.gateway.openai.context import RequestContext

    prompt = await client.render_text("word " * words)
    context = RequestContext(controls=Controls(**controls))
    return await client.prepare(prompt, SamplingParams(max_tokens=3000), "r", context)


def output_tokens(request: Any) -> int:
    return int(msgspec.msgpack.decode(request.sampling)["max_tokens"])


async def test_in_text_mode_a_prompt_may_be_longer_than_the_model(long_client: Any) -> None:
    request = await prepared(long_client, 2500, mode=PromptMode.TEXT)
    assert len(request.prompt) > long_client.engine_tokens == 2048
    assert (request.plan.kind, request.plan.mode) == ("prune", "text")
    assert output_tokens(request) == 2047
    found = await long_client.select(request)
    assert found.engine_tokens < 2048


@pytest.mark.parametrize(("controls", "reason"), [({}, "asked"), ({"prune": False}, "asked_off")])
async def test_no_other_prompt_may(long_client: Any, controls: Any, reason: str) -> None:
    from specprefill.core.errors import InvalidRequest

    with pytest.raises(InvalidRequest, match=f"at most 2048 .* text mode .*{reason}") as refused:
        await prepared(long_client, 2500, **controls)
    assert refused.value.field == "prompt"


@pytest.mark.parametrize(("mode", "most"), [(PromptMode.POSITIONS, 2048), (None, 2048)])
async def test_other_answers_end_at_the_models_last_position(
    long_client: Any, mode: PromptMode | None, most: int
) -> None:
    request = await prepared(long_client, 500, mode=mode)
    assert output_tokens(request) == most - len(request.prompt)
