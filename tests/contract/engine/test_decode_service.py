"""The decode service on an engine whose outputs are scripted: samples, failed pulls, logprobs."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import dataclass, field

import msgspec
import pytest
from vllm import SamplingParams
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import StructuredOutputsParams

from specprefill.core.errors import DecodeUnavailable, InvalidRequest
from specprefill.core.types import Lease, Plan, PlanKind, Reason, Request, Selection, Span, Ticket
from specprefill.decode.service import DecodeService

TOKENS = 16
DENSE = Selection(TOKENS, (Span(0, TOKENS),), Plan(PlanKind.DENSE, Reason.ASKED, 1.0))
TICKET = Ticket(Lease("a" * 32, "b" * 32), ("127.0.0.1:9",), "layout", TOKENS - 1)
CONSTRAINED = {"structured_outputs": StructuredOutputsParams(json='{"type": "object"}')}


def output(token_ids=(), finish_reason=None, prompt_logprobs=None) -> RequestOutput:
    tokens = list(token_ids)
    completion = CompletionOutput(0, "", tokens, None, None, finish_reason=finish_reason)
    ended = finish_reason is not None
    return RequestOutput("r", None, [0] * TOKENS, prompt_logprobs, [completion], ended)


@dataclass
class ScriptedEngine:
    """An engine that gives every sample the same outputs, each after a token of `allow`."""

    script: list[RequestOutput]
    cached: int = 0  # tokens of its prefix cache
    allow: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(1000))
    started: list[str] = field(default_factory=list)
    closed: list[str] = field(default_factory=list)
    tokenizer: None = None
    speculates: bool = False

    def prefix_cache_tokens(self) -> int:
        return self.cached

    async def generate(self, _prompt, _params, request_id, *_others):
        self.started.append(request_id)
        try:
            for each in self.script:
                await self.allow.acquire()
                yield each
        finally:
            self.closed.append(request_id)


def asked(samples: int = 1, **sampling) -> Request:
    wire = msgspec.msgpack.encode(SamplingParams(max_tokens=8, **sampling))
    return Request("r1", (0,) * TOKENS, wire, samples=samples, timeout_s=60.0)


def decode(engine, request, ticket):
    free = ((),) * request.samples
    return DecodeService(engine).decode(request, DENSE, ticket, free, 30.0)


async def collect(engine, request, ticket):
    return [step async for step in decode(engine, request, ticket)]


async def started_before_the_first_step(engine, ticket) -> int:
    """Return how many of three samples have started while no step has come."""
    engine.allow = asyncio.Semaphore(0)
    async with aclosing(decode(engine, asked(samples=3), ticket)) as steps:
        first = asyncio.create_task(anext(steps))
        for _ in range(20):  # until every task waits
            await asyncio.sleep(0)
        found = len(engine.started)
        engine.allow.release()
        assert (await first).chunk.token_ids == (5,)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(engine.started) == 3
    assert sorted(engine.closed) == sorted(engine.started)
    return found


ANSWER = [output([5]), output([6], "length")]


@pytest.mark.parametrize(
    ("cached", "ticket", "expected"), [(64, TICKET, 1), (0, TICKET, 3), (64, None, 3)]
)
async def test_one_sample_pulls_for_all_that_share_its_blocks(cached, ticket, expected):
    engine = ScriptedEngine(ANSWER, cached)
    assert await started_before_the_first_step(engine, ticket) == expected


async def test_every_sample_is_answered():
    steps = await collect(ScriptedEngine(ANSWER, 64), asked(samples=3), TICKET)
    tokens = {index: [] for index in range(3)}
    for step in steps:
        tokens[step.chunk.index] += step.chunk.token_ids
    assert tokens == {0: [5, 6], 1: [5, 6], 2: [5, 6]}


async def test_a_first_sample_that_fails_ends_the_request():
    engine = ScriptedEngine([output([], "abort")], 64)
    with pytest.raises(DecodeUnavailable):
        await collect(engine, asked(samples=3), TICKET)
    assert engine.started == ["decode-0-r1"]


async def test_cancelling_while_the_first_sample_pulls_closes_it():
    engine = ScriptedEngine(ANSWER, 64, asyncio.Semaphore(0))
    running = asyncio.create_task(collect(engine, asked(samples=3), TICKET))
    for _ in range(20):  # until every task waits
        await asyncio.sleep(0)
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    assert engine.started == engine.closed == ["decode-0-r1"]


@pytest.mark.parametrize(
    ("script", "ticket", "error"),
    [
        ([output([], "error")], TICKET, DecodeUnavailable),
        ([output([], "error")], None, InvalidRequest),
        ([output([5]), output([], "error")], TICKET, InvalidRequest),
        ([output([5], "error")], TICKET, InvalidRequest),
    ],
    ids=["pull", "computed", "after_a_token", "with_a_token"],
)
async def test_a_lost_pull_does_not_blame_the_schema(script, ticket, error):
    with pytest.raises(error):
        await collect(ScriptedEngine(script), asked(**CONSTRAINED), ticket)


async def test_prompt_logprobs_come_once():
    """vLLM's later deltas carry an empty list."""
    found = [None, {7: Logprob(-0.5, 1, "a")}]
    script = [output([5], None, found), output([6], None, []), output([7], "length", [])]
    steps = await collect(ScriptedEngine(script), asked(prompt_logprobs=1), None)
    assert [step.chunk.prompt_logprobs is not None for step in steps] == [True, False, False]
    assert steps[0].chunk.prompt_logprobs[1][0].token_id == 7
