"""Where a request's KV is computed, and how often, until its first token is known."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    AsyncExitStack,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass, replace

from .answer import Answer
from .budget import Budget
from .errors import DeadlineExceeded, Overloaded, PrefillUnavailable, Unavailable
from .ports import Decoder, LocalPrefill, Prefiller, Prefilling
from .prefetch import Prefetched, prefetch_first
from .types import (
    UNSCORED,
    DecodeStep,
    PrefillResult,
    PromptMode,
    Reason,
    Replay,
    Request,
    Selection,
    Ticket,
    whole_prompt,
)


@dataclass(frozen=True, slots=True)
class PrefillOutcome:
    """The first token, and a decode that was started before it was known.

    All None: the decode engine is to compute the prompt.
    """

    prefilling: Prefilling | None = None
    prefilled: PrefillResult | None = None
    steps: AsyncGenerator[DecodeStep] | None = None
    sureness: float | None = None  # see PrefillResult

    def note_kv(self, answer: Answer) -> None:
        """Release the KV once a decode engine has it for every sample."""
        if answer.kv_arrived and self.prefilling is not None:
            self.prefilling.kv_arrived()


@dataclass(frozen=True, slots=True)
class PrefillStage:
    """Computes a selection's KV in the prefill pool, or leaves it to decode; twice where unsure.

    See Pipeline for the fields.
    """

    prefiller: Prefiller
    decoder: Decoder
    overlap: bool
    local: LocalPrefill | None
    max_model_len: int | None
    recompute_below: float

    @asynccontextmanager
    async def start(
        self, request: Request, selection: Selection, budget: Budget
    ) -> AsyncIterator[tuple[Selection, PrefillOutcome]]:
        """Prefill the selection, or all of the prompt where it leaves the main model unsure.

        The KV of what is not sent is released first: all of the prompt may need its room. Raises
        PrefillUnavailable, DecodeUnavailable, Overloaded or DeadlineExceeded.
        """
        if not self._may_recompute(selection):
            async with self._prefill_or_skip(request, selection, budget) as outcome:
                yield selection, outcome
            return
        began_s, asked = budget.now(), replace(request, wants_sureness=True)
        async with self._prefill_or_skip(asked, selection, budget) as outcome:
            if outcome.sureness is None or outcome.sureness >= self.recompute_below:
                yield selection, outcome
                return
        whole = whole_prompt(selection, Reason.UNSURE_ANSWER)
        whole = replace(whole, discarded_s=budget.now() - began_s)
        async with AsyncExitStack() as inside:
            dense = await self._try_dense(inside, request, whole, budget)
            if dense is not None:
                yield whole, dense
                return
        selection = replace(selection, discarded_s=budget.now() - began_s)
        async with self._prefill_or_skip(request, selection, budget) as outcome:
            yield selection, outcome

    def _may_recompute(self, selection: Selection) -> bool:
        """Return True if the prompt is pruned by scores, and engines have room for all of it.

        Under load it is not: dense prompts are what the pools have no room for then.
        """
        if self.recompute_below == 0.0 or selection.mode is PromptMode.DENSE:
            return False
        if selection.plan.lowered or selection.plan.reason in {*UNSCORED, Reason.LOAD}:
            return False
        if self.max_model_len is None:
            return True
        # The answer's length was limited for the prompt's: in text mode for that of its text.
        room = self.max_model_len // (2 if selection.mode is PromptMode.TEXT else 1)
        return selection.prompt_tokens < room

    async def _try_dense(
        self, inside: AsyncExitStack, request: Request, whole: Selection, budget: Budget
    ) -> PrefillOutcome | None:
        """Prefill all of the prompt, in half of the time that is left. None: that failed."""
        try:
            async with asyncio.timeout(budget.left_s() / 2):
                dense = self._prefill_or_skip(request, whole, budget, attempts=1)
                return await inside.enter_async_context(dense)
        except (Overloaded, Unavailable, DeadlineExceeded, TimeoutError):
            return None  # the pruned prompt's answer is better than none

    @asynccontextmanager
    async def _prefill_or_skip(
        self, request: Request, selection: Selection, budget: Budget, attempts: int | None = None
    ) -> AsyncIterator[PrefillOutcome]:
        """Prefill in the prefill pool, unless decode computes the prompt."""
        with self._decide_local(request, selection) as local:
            if local and request.wants_sureness:
                async with self._decode_soon(request, selection, None, budget) as steps:
                    first = await steps.peek()
                    sureness = None if first is None else first.sureness
                    yield PrefillOutcome(steps=steps, sureness=sureness)
            elif local:
                yield PrefillOutcome()
            else:
                tries = attempts or budget.attempts
                async with self._prefill_with_retry(request, selection, budget, tries) as outcome:
                    yield outcome

    def _decide_local(self, request: Request, selection: Selection) -> AbstractContextManager[bool]:
        return nullcontext(False) if self.local is None else self.local.decide(request, selection)

    @asynccontextmanager
    async def _prefill_with_retry(
        self, request: Request, selection: Selection, budget: Budget, attempts: int
    ) -> AsyncIterator[PrefillOutcome]:
        """Prefill, on another engine when one is lost: nothing was sent yet."""
        for attempts_left in reversed(range(attempts)):
            async with AsyncExitStack() as inside:
                try:
                    outcome = await self._prefill_once(inside, request, selection, budget)
                except PrefillUnavailable:
                    budget.lost_replicas += 1
                    if attempts_left == 0:
                        raise
                    continue
                yield outcome
                return

    async def _prefill_once(
        self, inside: AsyncExitStack, request: Request, selection: Selection, budget: Budget
    ) -> PrefillOutcome:
        """Prefill, and start to decode while the last of the KV is still being computed."""
        prefill = self.prefiller.prefill(request, selection, budget.left_s())
        prefilling = await inside.enter_async_context(prefill)
        ticket = await prefilling.ticket()
        steps: AsyncGenerator[DecodeStep] | None = None
        if ticket is not None and self.overlap:
            decoding = self._decode_soon(request, selection, ticket, budget)
            steps = await inside.enter_async_context(decoding)
        prefilled = await prefilling.result()
        return PrefillOutcome(prefilling, prefilled, steps, prefilled.sureness)

    def _decode_soon(
        self, request: Request, selection: Selection, ticket: Ticket | None, budget: Budget
    ) -> AbstractAsyncContextManager[Prefetched[DecodeStep]]:
        """Start to decode; without a ticket the decode engine computes the prompt."""
        replay: Replay = ((),) * request.samples
        return prefetch_first(
            self.decoder.decode(request, selection, ticket, replay, budget.left_s())
        )
