"""The interfaces that the pipeline calls. Adapters (Serve handles, engines, fakes) provide them."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol

from .types import (
    Chunk,
    DecodeStep,
    Plan,
    PrefillResult,
    Replay,
    Report,
    Request,
    Selection,
    Ticket,
)


class Speculator(Protocol):
    """Chooses the prompt tokens that matter."""

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """Score the whole prompt and keep about `plan.keep` of it.

        Raises SpeculatorUnavailable when no replica can answer, Overloaded when all are
        full, DeadlineExceeded when `timeout_s` passes first.
        """
        ...


class TextWriter(Protocol):
    """Writes the kept text of a prompt as a prompt of its own."""

    async def write(self, request: Request, selection: Selection) -> Selection:
        """Return the selection in text mode, its runs widened to whole characters."""
        ...


class Prefilling(Protocol):
    """A prefill under way.

    `ticket` and `result` raise PrefillUnavailable, DeadlineExceeded, Overloaded or InvalidRequest.
    """

    async def ticket(self) -> Ticket | None:
        """Return the early ticket, once the KV is nearly complete and a pull may start.

        None when the ticket comes with the result only, or there is none. Await it before `result`.
        """
        ...

    async def result(self) -> PrefillResult:
        """Return the first token and the ticket for the KV."""
        ...

    def kv_arrived(self) -> None:
        """Release the KV: the decode engine has it."""
        ...


class Prefiller(Protocol):
    """Computes the kept tokens' KV and the first output token."""

    def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AbstractAsyncContextManager[Prefilling]:
        """Start to prefill; on exit always stop the engine and release the KV."""
        ...


class Decoder(Protocol):
    """Pulls the KV and streams the answer."""

    def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep]:
        """Stream every sample of the answer, from its first token on.

        Each sample first repeats its tokens in `replay`: they are forced, one step each, so
        that penalties, grammars, stop strings and seeds count them as if sampled there. The
        pipeline drops what the client has already. Without a ticket, or when the pull fails,
        the engine computes the prompt itself. With an empty replay it samples freely: as the
        prefill engine did, except for numerical noise.

        Raises DecodeUnavailable or DeadlineExceeded.
        """
        ...


class LocalPrefill(Protocol):
    """Decides which prompts the decode engine computes itself."""

    def decide(self, request: Request, selection: Selection) -> AbstractContextManager[bool]:
        """Enter while the request runs: True if decode computes its prompt."""
        ...

    def learn(
        self, request: Request, selection: Selection, report: Report, answer: Sequence[int]
    ) -> None:
        """Learn from a finished request; `answer` holds the output tokens of its first sample."""
        ...


class Answerer(Protocol):
    """The pipeline, bare or wrapped."""

    def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """Stream the answer's chunks; the last one carries the report."""
        ...

    async def select(self, request: Request) -> Selection:
        """Return the selection without answering."""
        ...
