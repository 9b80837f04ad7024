"""In-process fakes of the three pools: no engine, no network, real contracts.

They ship with the product, so that a pipeline or a gateway can be tried and tested in
milliseconds. The "model" answers with the kept tokens themselves, first to last, so a test
sees exactly what reached it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from msgspec import structs

from .errors import SpecPrefillError, SpeculatorLost
from .plan import Planner
from .ports import Answerer
from .types import (
    Chunk,
    DecodeStep,
    Lease,
    LocalPrefillTimes,
    Plan,
    PrefillResult,
    Replay,
    Request,
    Selection,
    Span,
    Ticket,
)

Inner = TypeVar("Inner", bound=Answerer)


@dataclass(slots=True)
class FakeSpeculator:
    """Keeps the first `plan.keep` of the prompt; `fails` is raised instead, if set."""

    fails: SpecPrefillError | None = None
    lost: int = 0  # calls under which it dies
    calls: int = 0
    timeouts_s: list[float] = field(default_factory=list)  # of the calls

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See the port."""
        self.calls += 1
        self.timeouts_s.append(timeout_s)
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        if self.lost > 0:
            self.lost -= 1
            raise SpeculatorLost("no speculator replica answered; try again")
        prompt_tokens = len(request.prompt)
        kept = max(1, int(prompt_tokens * plan.keep))
        return Selection(prompt_tokens, (Span(0, kept),), plan, speculate_s=0.25)


@dataclass(slots=True)
class FakePrefiller:
    """Answers with the first kept token; counts what it holds.

    With `early`, the ticket is there before the first token.
    """

    fails: list[SpecPrefillError | None] = field(default_factory=list)  # one per call
    ends_answer: bool = False  # the first token is the last
    early: bool = False
    sureness: list[float] = field(default_factory=list)  # one per call that wants it
    hangs: list[int] = field(default_factory=list)  # numbers of the calls that never end
    hung: asyncio.Event = field(default_factory=asyncio.Event)
    held: int = 0
    most_held: int = 0
    released: int = 0
    selections: list[Selection] = field(default_factory=list)

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[FakePrefilling]:
        """See the port."""
        del timeout_s
        error = self.fails.pop(0) if self.fails else None
        self.selections.append(selection)
        token = selection.engine_prompt(request.prompt)[0]
        chunk = Chunk(0, (token,), text_of(token))
        ticket = Ticket(Lease("lease", "secret"), ("peer:1",), "layout", selection.kept_tokens)
        prefilled = PrefillResult(chunk, ticket, queue_s=0.0, prefill_s=0.5)
        if self.ends_answer:
            prefilled = PrefillResult(_finish(chunk, "stop"), None, queue_s=0.0, prefill_s=0.5)
        if request.wants_sureness:
            prefilled = replace(prefilled, sureness=self.sureness.pop(0))
        hangs = len(self.selections) - 1 in self.hangs
        early = ticket if self.early else None
        prefilling = FakePrefilling(self, error, early, prefilled, hangs=hangs)
        try:
            yield prefilling
        finally:
            prefilling.kv_arrived()


@dataclass(slots=True)
class FakePrefilling:
    """One call of a FakePrefiller."""

    prefiller: FakePrefiller
    error: SpecPrefillError | None
    early: Ticket | None
    outcome: PrefillResult
    hangs: bool = False
    holds: bool = False

    async def ticket(self) -> Ticket | None:
        """See the port."""
        if self.early is not None:
            self._hold()
        return self.early

    async def result(self) -> PrefillResult:
        """See the port."""
        await asyncio.sleep(0)
        if self.hangs:
            self.prefiller.hung.set()
            await asyncio.Event().wait()
        if self.error is not None:
            raise self.error
        if self.outcome.ticket is not None:
            self._hold()
        return self.outcome

    def kv_arrived(self) -> None:
        """See the port."""
        if self.holds:
            self.holds = False
            self.prefiller.held -= 1
            self.prefiller.released += 1

    def _hold(self) -> None:
        if not self.holds:
            self.holds = True
            self.prefiller.held += 1
            self.prefiller.most_held = max(self.prefiller.most_held, self.prefiller.held)


@dataclass(slots=True)
class FakeDecoder:
    """Streams the kept tokens, `max_tokens` of them, for every sample in turn.

    `fails` holds the error to raise, one per call, before the token at `fails_at`; None: nothing.
    `samples_first` is the first token that it samples where nothing is replayed.
    """

    max_tokens: int = 4
    samples_first: int | None = None
    fails: list[SpecPrefillError | None] = field(default_factory=list)
    fails_at: int = 1
    sureness: list[float] = field(default_factory=list)  # one per call that wants it
    closed: int = 0
    replays: list[Replay] = field(default_factory=list)

    async def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep]:
        """See the port."""
        del timeout_s
        self.replays.append(replay)
        error = self.fails.pop(0) if self.fails else None
        tokens = selection.engine_prompt(request.prompt)[: self.max_tokens]
        wanted = request.wants_sureness and ticket is None
        sureness = self.sureness.pop(0) if wanted else None
        if self.samples_first is not None and not any(replay):
            tokens[0] = self.samples_first
        try:
            for index in range(request.samples):
                for place, token in enumerate(tokens):
                    await asyncio.sleep(0)
                    if error is not None and place == self.fails_at:
                        raise error
                    chunk = Chunk(index, (token,), text_of(token))
                    if place == len(tokens) - 1:
                        chunk = _finish(chunk, "length")
                    step = _decode_step(chunk, ticket)
                    yield step if place > 0 else structs.replace(step, sureness=sureness)
        finally:
            self.closed += 1


def _decode_step(chunk: Chunk, ticket: Ticket | None) -> DecodeStep:
    if ticket is None:
        return DecodeStep(chunk, 0.0, 0.0, computed=LocalPrefillTimes(queue_s=0.0, prefill_s=0.375))
    return DecodeStep(chunk, 0.125, 0.0625)


def text_of(token: int) -> str:
    """Return the fake model's text for one token."""
    return f"<{token}>"


def _finish(chunk: Chunk, reason: str) -> Chunk:
    return Chunk(chunk.index, chunk.token_ids, chunk.text, finish_reason=reason)


@dataclass(frozen=True, slots=True)
class PlannedPipeline(Generic[Inner]):
    """Plans each request and gives it to a pipeline, as a gateway's client does."""

    pipeline: Inner
    planner: Planner

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """See Pipeline.generate."""
        return self.pipeline.generate(self.planner.with_plan(request))

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self.pipeline.select(self.planner.with_plan(request))
