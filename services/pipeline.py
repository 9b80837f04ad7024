"""One request's way through the three pools. Knows ports, not frameworks."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from .answer import Answer
from .errors import (
    DeadlineExceeded,
    DecodeUnavailable,
    InvalidRequest,
    Overloaded,
    PrefillUnavailable,
    SpeculatorUnavailable,
)
from .plan import Planner
from .ports import Decoder, Prefiller, Speculator
from .types import Chunk, PlanKind, Prefilled, Reason, Request, Selection, dense, whole


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time, handed on as the time that is left."""

    at_s: float
    now: Callable[[], float]

    def left_s(self) -> float:
        """Seconds left. Raises DeadlineExceeded when there are none."""
        left = self.at_s - self.now()
        if left <= 0:
            raise DeadlineExceeded("timeout_s: the request's time was used up")
        return left


@dataclass(slots=True)
class Pipeline:
    """Keep the prompt tokens that matter, prefill them, hand the KV over, stream the answer."""

    speculator: Speculator
    prefiller: Prefiller
    decoder: Decoder
    planner: Planner
    speculate_timeout_s: float = 10.0
    attempts: int = 2  # engines per stage: a request that kills engines must not kill a pool
    now: Callable[[], float] = field(default=time.monotonic)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Stream the answer's chunks; the last one carries the report.

        Raises InvalidRequest, DeadlineExceeded, Overloaded, PrefillUnavailable or
        DecodeUnavailable. Closing the iterator releases all three pools.
        """
        started_s = self.now()
        deadline = Deadline(started_s + request.timeout_s, self.now)
        selection = await self._select(request, deadline)
        async with self._prefilled(request, selection, deadline) as prefilled:
            answer, ttft_s = Answer(request, prefilled), 0.0
            chunks = self._chunks(request, selection, prefilled, answer, deadline)
            async with aclosing(chunks) as stream:
                async for chunk in stream:
                    ttft_s = ttft_s or self.now() - started_s
                    done = answer.open_samples == 0
                    yield replace(chunk, report=answer.report(selection, ttft_s)) if done else chunk

    async def _chunks(
        self,
        request: Request,
        selection: Selection,
        prefilled: Prefilled,
        answer: Answer,
        deadline: Deadline,
    ) -> AsyncGenerator[Chunk, None]:
        """The first token at once, then the decode engine's; a lost engine is replaced."""
        for chunk in answer.early():  # the client has it before the KV moves
            yield chunk
        for attempts_left in reversed(range(self.attempts)):
            if answer.open_samples == 0:
                return
            steps = self.decoder.decode(
                request, selection, prefilled.ticket, answer.replay(), deadline.left_s()
            )
            try:
                async with aclosing(steps) as stream:  # type: ignore[type-var]
                    async for step in stream:
                        for chunk in answer.feed(step):
                            yield chunk
            except DecodeUnavailable:
                if attempts_left == 0:
                    raise

    @asynccontextmanager
    async def _prefilled(
        self, request: Request, selection: Selection, deadline: Deadline
    ) -> AsyncIterator[Prefilled]:
        """The prefill, tried again elsewhere when its engine is lost: nothing was sent yet."""
        async with AsyncExitStack() as held:
            for attempts_left in reversed(range(self.attempts)):
                try:
                    prefill = self.prefiller.prefill(request, selection, deadline.left_s())
                    prefilled = await held.enter_async_context(prefill)
                    break
                except PrefillUnavailable:
                    if attempts_left == 0:
                        raise
            yield prefilled

    async def select(self, request: Request) -> Selection:
        """Which tokens would be kept, without answering.

        Raises InvalidRequest or DeadlineExceeded.
        """
        return await self._select(request, Deadline(self.now() + request.timeout_s, self.now))

    async def _select(self, request: Request, deadline: Deadline) -> Selection:
        """Losing the speculator costs time, never the answer: the prompt goes dense."""
        if not request.prompt:
            raise InvalidRequest("prompt: must hold at least one token", "prompt")
        plan = self.planner.plan(request) if request.plan is None else request.plan
        if plan.kind is PlanKind.DENSE:
            return whole(len(request.prompt), plan)
        left_s = deadline.left_s()
        try:
            return await self.speculator.select(
                request, plan, min(left_s, self.speculate_timeout_s)
            )
        except (SpeculatorUnavailable, Overloaded):
            return dense(len(request.prompt), Reason.SPECULATOR_UNAVAILABLE)
        except DeadlineExceeded:
            if left_s <= self.speculate_timeout_s:
                raise
            return dense(len(request.prompt), Reason.SPECULATOR_TIMEOUT)
