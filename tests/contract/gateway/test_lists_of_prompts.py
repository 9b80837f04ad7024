"""A list of prompts in one request takes a bounded part of the pools at once."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

from specprefill.config import GatewayConfig
from specprefill.core.errors import Overloaded
from specprefill.core.types import Chunk, Request
from specprefill.gateway.openai.context import RequestContext
from tests.contract.conftest import TEXT, ScriptedPipeline

PROMPTS_AT_ONCE = GatewayConfig().prompts_at_once
MOST_AT_ONCE = 72  # what one speculator takes, queued and in work
PROMPTS = [[5, place + 6] for place in range(300)]


class SmallPipeline(ScriptedPipeline):
    """Refuses more than MOST_AT_ONCE prompts without a first token; answers when `opens` is set."""

    def reset(self) -> None:
        super().reset()
        self.running = self.most_running = 0
        self.opens, self.is_full = asyncio.Event(), asyncio.Event()
        self.opens.set()

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        if self.running == MOST_AT_ONCE:
            raise Overloaded("full")
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        if self.running == PROMPTS_AT_ONCE:
            self.is_full.set()
        counted = 1
        try:
            async with aclosing(super().generate(request)) as chunks:
                await self.opens.wait()
                async for chunk in chunks:
                    self.running, counted = self.running - counted, 0
                    yield chunk
        finally:
            self.running -= counted


@pytest.fixture
def small(gateway: Any, monkeypatch: pytest.MonkeyPatch) -> SmallPipeline:
    pipeline = SmallPipeline()
    monkeypatch.setattr(gateway[0], "_pipeline", pipeline)
    monkeypatch.setattr(gateway[0], "_max_samples", 1024)
    return pipeline


async def test_every_prompt_of_a_long_list_is_answered(
    http: httpx.AsyncClient, small: SmallPipeline
) -> None:
    small.opens.clear()
    call = asyncio.create_task(http.post("/v1/completions", json={"prompt": PROMPTS}))
    await asyncio.wait_for(small.is_full.wait(), 10)
    for _ in range(1000):  # more would begin now
        await asyncio.sleep(0)
    small.opens.set()
    answer = await call
    assert answer.status_code == 200, answer.text
    assert [choice["text"] for choice in answer.json()["choices"]] == [TEXT] * len(PROMPTS)
    reports = answer.json()["specprefill"]
    assert len(reports) == len(small.requests) == len(PROMPTS)
    assert small.most_running == PROMPTS_AT_ONCE


async def test_every_prompt_of_a_streamed_list_is_answered(
    http: httpx.AsyncClient, small: SmallPipeline
) -> None:
    answer = await http.post("/v1/completions", json={"prompt": PROMPTS, "stream": True})
    assert answer.status_code == 200, answer.text
    texts = [""] * len(PROMPTS)
    for line in answer.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line.removeprefix("data: "))["choices"]:
                texts[choice["index"]] += choice["text"]
    assert texts == [TEXT] * len(PROMPTS)


async def test_a_prompt_that_waits_has_the_time_that_is_left(
    http: httpx.AsyncClient, small: SmallPipeline
) -> None:
    await http.post("/v1/completions", json={"prompt": PROMPTS})
    first, last = small.requests[0], small.requests[-1]
    assert last.timeout_s < first.timeout_s <= 60.0


async def test_the_time_of_a_request_ends_while_its_prompts_wait(
    http: httpx.AsyncClient, small: SmallPipeline
) -> None:
    small.opens.clear()
    limit = {"x-request-timeout-seconds": "0.4"}
    answer = await http.post("/v1/completions", json={"prompt": PROMPTS}, headers=limit)
    assert answer.status_code == 504
    assert answer.json()["error"]["message"].startswith("timeout_s: ")
    assert (small.running, small.most_running) == (0, PROMPTS_AT_ONCE)


async def test_a_list_that_is_cancelled_ends_all_its_prompts(
    http: httpx.AsyncClient, small: SmallPipeline
) -> None:
    small.opens.clear()
    call = asyncio.create_task(http.post("/v1/completions", json={"prompt": PROMPTS}))
    await asyncio.wait_for(small.is_full.wait(), 10)
    call.cancel()
    await asyncio.wait({call})
    assert small.running == 0
    small.opens.set()
    assert (await http.post("/v1/completions", json={"prompt": PROMPTS})).status_code == 200


async def test_prompts_that_leave_release_their_slots() -> None:
    context, held = RequestContext(), asyncio.Event()

    async def hold() -> None:
        async with context.prompt_slot(10.0, PROMPTS_AT_ONCE):
            if context.prompt_slots.locked():
                held.set()
            await asyncio.Event().wait()

    async with asyncio.timeout(10):
        tasks = [asyncio.create_task(hold()) for _ in range(2 * PROMPTS_AT_ONCE)]
        await held.wait()
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
        again = [context.prompt_slot(10.0, PROMPTS_AT_ONCE) for _ in range(PROMPTS_AT_ONCE)]
        for slot in again:
            await slot.__aenter__()
    assert context.prompt_slots.locked()


async def test_a_slot_is_the_next_prompts_from_the_first_token_on() -> None:
    context = RequestContext()
    async with asyncio.timeout(10), context.prompt_slot(10.0, PROMPTS_AT_ONCE) as first:
        for _ in range(PROMPTS_AT_ONCE - 1):
            await context.prompt_slot(10.0, PROMPTS_AT_ONCE).__aenter__()
        assert context.prompt_slots.locked()
        first.release()
        async with context.prompt_slot(10.0, PROMPTS_AT_ONCE):
            assert context.prompt_slots.locked()
    assert not context.prompt_slots.locked()
