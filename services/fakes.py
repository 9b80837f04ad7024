"""In-process stand-ins for the three pools: no engine, no network, real contracts.

They ship with the product, so that a pipeline or a gateway can be tried and tested in
milliseconds. The "model" answers with the kept tokens themselves, first to last, so a test
sees exactly what reached it.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from .errors import SpecPrefillError
from .types import (
    Chunk,
    Decoded,
    Plan,
    Prefilled,
    Replay,
    Request,
    Selection,
    Span,
    Ticket,
)


@dataclass(slots=True)
class FakeSpeculator:
    """Keeps the first `plan.keep` of the prompt; `fails` is raised instead, if set."""

    fails: SpecPrefillError | None = None
    calls: int = 0

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See the port."""
        del timeout_s
        self.calls += 1
        await asyncio.sleep(0)
        if self.fails is not None:
            raise self.fails
        prompt_tokens = len(request.prompt)
        kept = max(1, int(prompt_tokens * plan.keep))
        return Selection(prompt_tokens, (Span(0, kept),), plan, speculate_s=0.25)


@dataclass(slots=True)
class FakePrefiller:
    """Answers with the first kept token; counts what it holds."""

    fails: list[SpecPrefillError | None] = field(default_factory=list)  # one per call
    ends_answer: bool = False  # the first token is the last
    held: int = 0
    released: int = 0
    selections: list[Selection] = field(default_factory=list)

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilled]:
        """See the port."""
        del timeout_s
        error = self.fails.pop(0) if self.fails else None
        if error is not None:
            raise error
        self.selections.append(selection)
        token = selection.kept(request.prompt)[0]
        chunk = Chunk(0, (token,), text_of(token))
        ticket = Ticket("lease", "secret", ("peer:1",), "layout", selection.kept_tokens)
        if self.ends_answer:
            yield Prefilled(_finished(chunk, "stop"), None, queue_s=0.0, prefill_s=0.5)
            return
        self.held += 1
        try:
            yield Prefilled(chunk, ticket, queue_s=0.0, prefill_s=0.5)
        finally:
            self.held -= 1
            self.released += 1


@dataclass(slots=True)
class FakeDecoder:
    """Streams the kept tokens, `max_tokens` of them, for every sample in turn.

    `fails` holds what to raise, one per call, before the token at `fails_at`; None: nothing.
    """

    max_tokens: int = 4
    fails: list[SpecPrefillError | None] = field(default_factory=list)
    fails_at: int = 1
    closed: int = 0
    replays: list[Replay] = field(default_factory=list)

    async def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncIterator[Decoded]:
        """See the port."""
        del timeout_s
        self.replays.append(replay)
        error = self.fails.pop(0) if self.fails else None
        tokens = selection.kept(request.prompt)[: self.max_tokens]
        try:
            for index in range(request.samples):
                for place, token in enumerate(tokens):
                    await asyncio.sleep(0)
                    if error is not None and place == self.fails_at:
                        raise error
                    chunk = Chunk(index, (token,), text_of(token))
                    if place == len(tokens) - 1:
                        chunk = _finished(chunk, "length")
                    yield Decoded(chunk, 0.125, 0.0625, recomputed=ticket is None)
        finally:
            self.closed += 1


def text_of(token: int) -> str:
    """The fake model's text for one token."""
    return f"<{token}>"


def _finished(chunk: Chunk, reason: str) -> Chunk:
    return Chunk(chunk.index, chunk.token_ids, chunk.text, finish_reason=reason)
