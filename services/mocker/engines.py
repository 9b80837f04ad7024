"""Engines that take the time of real ones, and compute nothing.

Their times are the stage curves of `simulation.hardware` (an 8B speculator, a 70B model on four
H100s), with prefix caches of their own, one prompt at a time where a real engine computes, and a
limit of running answers. What they keep and answer follows from the prompt alone: the next turn of
a conversation keeps what the last one kept, and another engine answers alike.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from uuid import uuid4

import msgspec
import numpy as np
from msgspec import structs

from ..control.prefixes import PrefixMemory
from ..control.scaling.values import Engines
from ..control.stages import Curve, StageCurves
from ..core.carry_over import continue_selection
from ..core.prefix_digests import BLOCK_TOKENS, digests_of, kept_digests
from ..core.selection import Scores, SelectionPolicy, select, settle
from ..core.types import (
    Chunk,
    DecodeStep,
    Lease,
    LocalPrefillTimes,
    Plan,
    PrefillResult,
    PromptMode,
    Replay,
    Request,
    Selection,
    Ticket,
)
from ..speculator.kept_memory import KeptMemory

CACHE_TOKENS = 1 << 20  # of a pool's replica
KEPT_BYTES = 1 << 25
CERTAINTY = 1.0
DEFAULT_MAX_TOKENS = 16  # vLLM's
TOKENS = 512  # different ones in answers, above the tokenizers' special ones
FIRST_TOKEN = 64


def at_speed(engines: Engines, speed: float) -> Engines:
    """Return engines `speed` times as fast."""
    curves = engines.curves
    return replace(
        engines,
        curves=StageCurves(
            speculate=curves.speculate.scale(1 / speed),
            prefill=curves.prefill.scale(1 / speed),
            transfer=curves.transfer.scale(1 / speed),
            first_decode=curves.first_decode.scale(1 / speed),
        ),
        output_token_s=engines.output_token_s / speed,
    )


class Turns:
    """One engine: whoever computes waits for those before it."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve
        self._memory = PrefixMemory(CACHE_TOKENS // BLOCK_TOKENS)
        self._turn = asyncio.Lock()

    async def compute(self, digests: tuple[int, ...], tokens: int) -> tuple[int, float, float]:
        """Take the time of a prompt; return its cached tokens, seconds waited, and computed."""
        came_s = time.monotonic()
        async with self._turn:
            began_s = time.monotonic()
            cached = self._memory.longest_match(digests, tokens)
            await asyncio.sleep(self._curve.seconds(tokens - cached, cached))
            self._memory.remember(digests, tokens)
        return cached, began_s - came_s, time.monotonic() - began_s


class MockSpeculator:
    """Keeps chunks by random scores, which equal beginnings of prompts share."""

    def __init__(self, engines: Engines, policy: SelectionPolicy) -> None:
        self._turns = Turns(engines.curves.speculate)
        self._policy = policy
        self._kept = KeptMemory(KEPT_BYTES)

    async def select(self, request: Request, plan: Plan) -> Selection:
        """Select as the real one, from other scores."""
        prompt, protected = request.prompt, request.protected
        settled = settle(len(prompt), plan, protected, self._policy)
        if settled is not None:
            return settled
        read = await self._turns.compute(digests_of(request), len(prompt))
        scores = _scores(request)
        carries = self._policy.carry_over and plan.mode is PromptMode.POSITIONS
        before = self._kept.find(prompt, request.cache_salt) if carries else None
        if before is None:
            chosen = select(scores, plan, protected, self._policy, CERTAINTY)
        else:
            chosen = continue_selection(scores, plan, protected, self._policy, CERTAINTY, before)
        if carries:
            self._kept.remember(
                prompt, chosen, plan.reason, request.cache_salt, request.opening_tokens
            )
        remembered, queue_s, speculate_s = read
        return replace(
            chosen, queue_s=queue_s, speculate_s=speculate_s, remembered_tokens=remembered
        )


class MockPrefill:
    """Answers with the first token. Its tickets name no worker: no KV is held or moved."""

    def __init__(self, engines: Engines) -> None:
        self._turns = Turns(engines.curves.prefill)

    async def prefill(self, request: Request, selection: Selection) -> PrefillResult:
        """Take the time of the kept tokens that are not cached."""
        digests = kept_digests(digests_of(request), selection.runs)
        tokens = selection.engine_tokens
        cached, queue_s, prefill_s = await self._turns.compute(digests, tokens)
        ends = _max_tokens(request) == 1 and request.samples == 1
        first = _chunk(request, 0, 0, cached, ends=ends)
        ticket = Ticket(Lease(uuid4().hex, ""), (), "mock", tokens)
        return PrefillResult(first, None if ends else ticket, queue_s, prefill_s)


class MockDecode:
    """Streams a token of each sample at a time, for as many answers as there are slots."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self._turns = Turns(engines.curves.prefill)
        self._slots = asyncio.Semaphore(engines.decode_slots)

    async def decode(
        self, request: Request, selection: Selection, ticket: Ticket | None, replay: Replay
    ) -> AsyncGenerator[DecodeStep]:
        """Pull for as long as the KV would take, or compute the prompt; then stream."""
        async with self._slots:
            cached, last = await self._start(request, selection, ticket)
            count = _max_tokens(request)
            begun = min(map(len, replay))
            for place in range(count):
                if place >= begun:  # what is repeated takes one step
                    await asyncio.sleep(self._engines.output_token_s)
                ends = place == count - 1
                for index in range(request.samples):
                    chunk = _chunk(request, index, place, cached, ends=ends)
                    yield structs.replace(last, chunk=chunk) if ends else DecodeStep(chunk)

    async def _start(
        self, request: Request, selection: Selection, ticket: Ticket | None
    ) -> tuple[int, DecodeStep]:
        """Return the cached tokens, and the times that the last step reports."""
        tokens, curves = selection.engine_tokens, self._engines.curves
        if ticket is None:
            digests = kept_digests(digests_of(request), selection.runs)
            cached, queue_s, prefill_s = await self._turns.compute(digests, tokens)
            times = LocalPrefillTimes(queue_s, prefill_s)
            return cached, DecodeStep(_NOTHING, 0.0, 0.0, computed=times)
        transfer_s, first_s = curves.transfer.seconds(tokens), curves.first_decode.seconds(tokens)
        await asyncio.sleep(transfer_s + first_s)
        return 0, DecodeStep(_NOTHING, transfer_s, first_s)


_NOTHING = Chunk(0, (), "")


def _scores(request: Request) -> Scores:
    """Return `[N]` scores, the same for the same beginning."""
    seed = digests_of(request)[:1] or (0,)
    scores: Scores = np.random.default_rng(seed).random(len(request.prompt), dtype=np.float32)
    return scores


def _max_tokens(request: Request) -> int:
    """Return the length of the answer, which no end token cuts short."""
    asked: int | None = msgspec.msgpack.decode(request.sampling).get("max_tokens")
    return DEFAULT_MAX_TOKENS if asked is None else asked


def _chunk(request: Request, index: int, place: int, cached: int, *, ends: bool) -> Chunk:
    """Return one token of a sample's answer: its number follows from the prompt's end."""
    token = FIRST_TOKEN + (sum(request.prompt[-8:]) + place) % TOKENS
    finish_reason = "length" if ends else None
    return Chunk(index, (token,), "word ", finish_reason=finish_reason, cached_tokens=cached)
