"""The path of one request through the three pools. Knows ports, not frameworks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from msgspec import structs

from .answer import Answer, Diverged
from .budget import ATTEMPTS, Budget
from .errors import (
    DeadlineExceeded,
    DecodeUnavailable,
    InvalidRequest,
    Overloaded,
    ScoringTimeout,
    SpeculatorLost,
    SpeculatorUnavailable,
)
from .fallback import Fallback, Patience
from .plan import plan_of
from .ports import Decoder, LocalPrefill, Prefiller, Speculator, TextWriter
from .prefill_stage import PrefillOutcome, PrefillStage
from .types import (
    Chunk,
    Plan,
    PlanKind,
    PromptMode,
    Reason,
    Request,
    Selection,
    dense_selection,
    keep_all,
    whole_prompt,
)

_LEAST_PAUSE_S = 0.05  # before a decode pool that was full is asked again


@dataclass(slots=True)
class Pipeline:
    """Keep the prompt tokens that matter, prefill them, hand the KV over, stream the answer."""

    speculator: Speculator
    prefiller: Prefiller
    decoder: Decoder
    patience: Patience = field(default_factory=Patience)  # with the speculator
    fallback: Fallback = field(default_factory=Fallback)  # where that runs out
    # Called with a request that was shed, and the seconds its scoring had taken: it has no report.
    on_unscored: Callable[[Request, float], None] | None = None
    overlap: bool = True  # decode pulls the KV while it is computed
    local: LocalPrefill | None = None  # None: every prompt is computed by the prefill pool
    texts: TextWriter | None = None  # None: no plan may have text mode
    max_model_len: int | None = None  # of a prompt and its answer in an engine; None: any length
    # Pruned prompts are prefilled again, dense, where the first token's sureness is lower; 0: none.
    recompute_below: float = 0.0
    attempts: int = ATTEMPTS
    now: Callable[[], float] = field(default=time.monotonic)

    async def generate(self, request: Request) -> AsyncGenerator[Chunk]:
        """Stream the answer's chunks; the last one carries the report.

        Raises InvalidRequest, DeadlineExceeded, Overloaded, PrefillUnavailable or
        DecodeUnavailable. Closing the iterator releases all three pools.
        """
        started_s = self.now()
        budget = Budget(started_s + request.timeout_s, self.now, self.attempts)
        selected = await self._select(request, budget)
        async with self._prefill_stage().start(request, selected, budget) as (selection, start):
            answer, ttft_s = Answer(request, start.prefilled), 0.0
            chunks = self._stream_chunks(request, selection, start, answer, budget)
            async with aclosing(chunks) as stream:
                async for chunk in stream:
                    if ttft_s == 0.0:
                        ttft_s = self.now() - started_s
                        if _is_late_by_itself(request, selection, budget):
                            chunk = structs.replace(chunk, late_by_itself=True)
                    if answer.open_samples == 0:
                        report = answer.report(selection, ttft_s, budget.lost_replicas)
                        if self.local is not None:
                            self.local.learn(request, selection, report, answer.token_ids(0))
                        chunk = structs.replace(chunk, report=report)
                    yield chunk

    def _prefill_stage(self) -> PrefillStage:
        return PrefillStage(
            prefiller=self.prefiller,
            decoder=self.decoder,
            overlap=self.overlap,
            local=self.local,
            max_model_len=self.max_model_len,
            recompute_below=self.recompute_below,
        )

    async def _stream_chunks(
        self,
        request: Request,
        selection: Selection,
        start: PrefillOutcome,
        answer: Answer,
        budget: Budget,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the first token at once, then the decode engine's; replace a lost engine.

        A full decode pool is waited for once the client has a token: its answer has begun.
        """
        first = answer.first_chunk()
        if first is not None:  # the client has it, whether the KV has moved or not
            yield first
        steps, attempts_left = start.steps, budget.attempts
        lost = DecodeUnavailable("decode: no engine ended the answer")
        while answer.open_samples > 0:
            if attempts_left == 0:
                raise lost
            attempts_left -= 1
            replay = answer.start_replay()
            if steps is None:
                ticket = None if start.prefilled is None else start.prefilled.ticket
                steps = self.decoder.decode(request, selection, ticket, replay, budget.left_s())
            try:
                async with aclosing(steps) as stream:
                    async for step in stream:
                        chunk = answer.add_step(step)
                        start.note_kv(answer)
                        if chunk is not None:
                            yield chunk
            except Diverged:
                pass  # the next one repeats the client's tokens
            except Overloaded as error:
                await _wait_for_place(error, answer, budget)
                attempts_left += 1  # none was lost
            except DecodeUnavailable as error:
                budget.lost_replicas += 1
                lost = error
            steps = None

    async def select(self, request: Request) -> Selection:
        """Return the selection without answering.

        Raises InvalidRequest or DeadlineExceeded.
        """
        budget = Budget(self.now() + request.timeout_s, self.now, self.attempts)
        return await self._select(request, budget)

    async def _select(self, request: Request, budget: Budget) -> Selection:
        """Select tokens, and in text mode write them as a prompt of its own."""
        selection = await self._select_tokens(request, budget)
        if selection.mode is PromptMode.TEXT:
            selection = await self._write_text(request, selection)
        self._check_room(selection)
        return selection

    async def _write_text(self, request: Request, selection: Selection) -> Selection:
        if self.texts is None:
            raise ValueError(f"request {request.request_id}: no text can be written here")
        written = await self.texts.write(request, selection)
        if written.engine_tokens < selection.prompt_tokens:
            return written
        # The marks take as many tokens as the gaps save.
        return whole_prompt(selection, Reason.NO_GAIN)

    def _check_room(self, selection: Selection) -> None:
        """Refuse what engines have no positions for: a prompt that was accepted to be cut shorter.

        Raises SpeculatorUnavailable where it may fit later, else InvalidRequest.
        """
        if self.max_model_len is None or selection.engine_tokens < self.max_model_len:
            return
        reason = selection.plan.reason
        message = (
            f"prompt: {selection.engine_tokens} of its {selection.prompt_tokens} tokens are left "
            f"({reason}); with its answer it must have at most {self.max_model_len} "
            "(model.max_model_len)"
        )
        if reason is Reason.SPECULATOR_UNAVAILABLE:
            raise SpeculatorUnavailable(message)
        raise InvalidRequest(message, "prompt")

    async def _select_tokens(self, request: Request, budget: Budget) -> Selection:
        """Select tokens. Losing the speculator costs time, never the answer."""
        if not request.prompt:
            raise InvalidRequest("prompt: must hold at least one token", "prompt")
        plan = plan_of(request)
        if plan.kind is PlanKind.DENSE:
            return keep_all(len(request.prompt), plan)
        left_s, asked_s = budget.left_s(), self.now()
        timeout_s = min(left_s, self.patience.seconds(len(request.prompt)))
        try:
            return await self._score(request, plan, asked_s, timeout_s, budget)
        except SpeculatorUnavailable:
            selection = dense_selection(len(request.prompt), Reason.SPECULATOR_UNAVAILABLE)
            return replace(selection, queue_s=self.now() - asked_s)
        except Overloaded as error:
            reason, retry_after_s = Reason.SPECULATOR_OVERLOADED, error.retry_after_s
            queue_s, speculate_s = self.now() - asked_s, 0.0
        except DeadlineExceeded as error:
            if left_s <= timeout_s:
                raise
            reason, retry_after_s = Reason.SPECULATOR_TIMEOUT, timeout_s
            # Time that no stage reports was spent in the queue.
            speculate_s = error.speculate_s if isinstance(error, ScoringTimeout) else 0.0
            queue_s = max(0.0, self.now() - asked_s - speculate_s)
        return self._select_unscored(request, plan, reason, retry_after_s, (queue_s, speculate_s))

    async def _score(
        self, request: Request, plan: Plan, asked_s: float, timeout_s: float, budget: Budget
    ) -> Selection:
        """Ask a speculator, and another one when it is lost."""
        left_s, attempts_left = timeout_s, budget.attempts
        while True:
            try:
                return await self.speculator.select(request, plan, left_s)
            except SpeculatorLost:
                budget.lost_replicas += 1
                left_s, attempts_left = asked_s + timeout_s - self.now(), attempts_left - 1
                if attempts_left == 0 or left_s <= 0:
                    raise

    def _select_unscored(
        self,
        request: Request,
        plan: Plan,
        reason: Reason,
        retry_after_s: float,
        spent_s: tuple[float, float],  # in the speculator's queue, and scoring
    ) -> Selection:
        """Return the selection without scores. Raises Overloaded where the policy is to shed."""
        queue_s, speculate_s = spent_s
        try:
            selection = self.fallback.selection(request, plan, reason, retry_after_s)
        except Overloaded:
            if self.on_unscored is not None:
                self.on_unscored(request, speculate_s)
            raise
        return replace(selection, queue_s=queue_s, speculate_s=speculate_s)


async def _wait_for_place(error: Overloaded, answer: Answer, budget: Budget) -> None:
    """Wait before a full decode pool is asked again; raise `error` where nothing was sent yet."""
    if not answer.is_started:
        raise error
    pause_s = max(_LEAST_PAUSE_S, error.retry_after_s)
    await asyncio.sleep(min(pause_s, budget.left_s()))


def _is_late_by_itself(request: Request, selection: Selection, budget: Budget) -> bool:
    """Return True if the first token came later than queues and one prefill make it."""
    return selection.discarded_s > 0.0 or budget.lost_replicas > 0 or request.hold_back_chars > 0
