"""What the pipeline needs from the world. Adapters (Serve handles, engines, fakes) provide it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from typing import Protocol

from .types import Decoded, Plan, Prefilled, Replay, Request, Selection, Ticket


class Speculator(Protocol):
    """Chooses the prompt tokens that matter."""

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """Score the whole prompt and keep about `plan.keep` of it.

        Raises SpeculatorUnavailable when no replica can answer, Overloaded when all are
        full, DeadlineExceeded when `timeout_s` passes first.
        """
        ...


class Prefiller(Protocol):
    """Computes the kept tokens' KV and the first output token."""

    def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AbstractAsyncContextManager[Prefilled]:
        """Prefill on entry; the KV is held while inside and released on exit, always.

        Raises PrefillUnavailable, DeadlineExceeded, Overloaded or InvalidRequest on entry.
        """
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
    ) -> AsyncIterator[Decoded]:
        """Stream every sample of the answer, from its first token on.

        Each sample first repeats its tokens in `replay`: they are forced, one step each, so
        that penalties, grammars, stop strings and seeds count them as if sampled there. The
        pipeline drops what the client has already. Without a ticket, or when the pull fails,
        the engine computes the prompt itself.

        Raises DecodeUnavailable or DeadlineExceeded.
        """
        ...
