"""vLLM's real server code over a scripted pipeline. Importing vLLM takes seconds: once."""

from __future__ import annotations

import asyncio
import logging
import os
import warnings
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any

import grpc
import httpx
import msgspec
import openai
import pytest

from specprefill.config import AppConfig, key_digest
from specprefill.core.plan import Planner
from specprefill.core.types import (
    Chunk,
    Plan,
    PlanKind,
    Reason,
    Report,
    Request,
    Selection,
    Span,
    TokenLogprob,
)
from specprefill.gateway.openai.access import RequestLimit
from specprefill.gateway.openai.keys import KeyRing
from specprefill.gateway.openai.request_json import JsonLimits

WORDS = (" alpha", " bravo", " charlie")
TEXT = "".join(WORDS)  # what every scripted answer holds
CHAT = {"model": "demo", "messages": [{"role": "user", "content": "hello"}]}
API_KEY = "test-key"
KEYS = KeyRing({"tests": key_digest(API_KEY), "others": key_digest("other-key")})
SHED: list[str] = []  # reasons
LIMIT = RequestLimit(64, SHED.append)
JSON_LIMITS = JsonLimits(items=2000)
MAX_MESSAGE_BYTES = 100_000


PLANNER = Planner(enabled=True, keep=0.3, min_prompt_tokens=48)


class ScriptedPipeline:
    """Answers every prompt with WORDS, or fails as configured."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.requests: list[Request] = []
        self.fails: Exception | None = None
        self.fails_after = 0  # chunks sent before the failure
        self.pause_s = 0.0
        self.closed = 0
        self.began, self.ended = asyncio.Event(), asyncio.Event()
        self.stop_reason: str | int | None = None

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        self.requests.append(request)
        self.began.set()
        try:
            for place, chunk in enumerate(self._script(request)):
                if self.fails is not None and place == self.fails_after:
                    raise self.fails
                yield chunk
                await asyncio.sleep(self.pause_s)
        finally:
            self.closed += 1
            self.ended.set()

    async def select(self, request: Request) -> Selection:
        self.requests.append(request)
        if self.fails is not None:
            raise self.fails
        plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.5)
        return Selection(len(request.prompt), (Span(0, 2), Span(4, 5)), plan, 0.25, 0.5)

    def _script(self, request: Request) -> Iterator[Chunk]:
        logprobs = msgspec.msgpack.decode(request.sampling).get("logprobs")
        for place, word in enumerate(WORDS):
            for index in range(request.samples):
                last = place == len(WORDS) - 1
                done = last and index == request.samples - 1
                token = 300 + 10 * index + place
                yield Chunk(
                    index,
                    (token,),
                    word,
                    logprobs=None if logprobs is None else (_position(token, word),),
                    finish_reason="stop" if last else None,
                    stop_reason=self.stop_reason if last else None,
                    cached_tokens=7,
                    report=_report(request) if done else None,
                )


class ScriptedHealth:
    """Healthy replicas, as configured."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.counts = {"speculator": 1, "prefill": 1, "decode": 1}

    async def __call__(self) -> Mapping[str, int]:
        return self.counts


async def metrics_text() -> str:
    """Return the metrics of the whole service."""
    return "ray_specprefill_requests_total 3.0\n"


def _position(token: int, word: str) -> tuple[TokenLogprob, ...]:
    return TokenLogprob(token, -0.25, 1, word), TokenLogprob(token + 1, -1.5, 2, " other")


def _report(request: Request) -> Report:
    prompt_tokens = len(request.prompt)
    return Report(
        PlanKind.PRUNE,
        Reason.DEFAULT,
        prompt_tokens,
        prompt_tokens // 2,
        0.5,
        queue_s=0.0,
        speculate_s=0.125,
        prefill_s=0.25,
        transfer_s=0.5,
        first_decode_s=0.0625,
        ttft_s=1.0,
    )


def configuration(**gateway: Any) -> AppConfig:
    return AppConfig.model_validate(
        {
            "model": {"path": "models/demo-main", "name": "demo", "max_model_len": 2048},
            "speculator": {"path": "models/demo-speculator"},
            "selection": {"tail_tokens": 4},
            "gateway": {
                "request_timeout_s": 60.0,
                "max_body_bytes": MAX_MESSAGE_BYTES,
                "max_request_items": JSON_LIMITS.items,
                "max_samples": 128,
                **gateway,
            },
        }
    )


@pytest.fixture(scope="session")
def gateway() -> Iterator[Any]:
    """Client, HTTP app, pipeline and health of one gateway; see the `front` fixture."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of third parties, while they are imported
        from specprefill.gateway.openai.server import build_client, build_http_app

        pipeline, health = ScriptedPipeline(), ScriptedHealth()
        config = configuration()
        client = build_client(config, pipeline, PLANNER)
        app = asyncio.run(build_http_app(config, client, health, KEYS, LIMIT, metrics_text))
    yield client, app, pipeline, health
    client.renderer.shutdown()


@pytest.fixture
def pipeline(gateway: Any) -> ScriptedPipeline:
    gateway[2].reset()
    return gateway[2]


@pytest.fixture
def health(gateway: Any) -> ScriptedHealth:
    gateway[3].reset()
    return gateway[3]


@pytest.fixture
async def http(gateway: Any, pipeline: ScriptedPipeline) -> AsyncIterator[httpx.AsyncClient]:
    """A client with a key."""
    transport = httpx.ASGITransport(gateway[1])
    key = {"authorization": f"Bearer {API_KEY}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=key) as client:
        yield client


@pytest.fixture
async def client(gateway: Any) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official client, with a key."""
    http = httpx.AsyncClient(transport=httpx.ASGITransport(gateway[1]))
    async with openai.AsyncOpenAI(
        api_key=API_KEY, base_url="http://x/v1", http_client=http, max_retries=0
    ) as client:
        yield client


def sampling(pipeline: Any) -> dict[str, Any]:
    """The sampling parameters of the last request that reached the pipeline."""
    return msgspec.msgpack.decode(pipeline.requests[-1].sampling)


class Call:
    """A gRPC call with a key, as a servicer sees it; keeps the status."""

    code: grpc.StatusCode | None = None
    details = ""

    def invocation_metadata(self) -> list[tuple[str, str]]:
        return [("authorization", f"Bearer {API_KEY}")]

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def set_trailing_metadata(self, trailing_metadata: list[tuple[str, str]]) -> None:
        self.trailing = trailing_metadata


async def chat(client: openai.AsyncOpenAI, **fields: Any) -> Any:
    """Ask for a chat answer."""
    messages = fields.pop("messages", CHAT["messages"])
    return await client.chat.completions.create(model="demo", messages=messages, **fields)


@pytest.fixture
def quiet(caplog: pytest.LogCaptureFixture) -> Any:
    """No record of an error, from anybody, is left by a test."""
    yield
    loud = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert loud == []
