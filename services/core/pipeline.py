"""The path of one request through the three pools. Knows ports, not frameworks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import (
    AbstractContextManager,
    AsyncExitStack,
    aclosing,
    asynccontextmanager,
    nullcontext,
)
from dataclasses import dataclass, field, replace

from msgspec import structs

from .answer import Answer, Diverged
from .errors import (
    DeadlineExceeded,
    DecodeUnavailable,
    InvalidRequest,
    Overloaded,
    PrefillUnavailable,
    ScoringTimeout,
    SpeculatorLost,
    SpeculatorUnavailable,
    Unavailable,
)
from .fallback import Fallback, Patience
from .plan import plan_of
from .ports import Decoder, LocalPrefill, Prefiller, Prefilling, Speculator, TextWriter
from .prefetch import prefetch_first
from .types import (
    UNSCORED,
    Chunk,
    DecodeStep,
    Plan,
    PlanKind,
    PrefillResult,
    PromptMode,
    Reason,
    Replay,
    Request,
    Selection,
    dense_selection,
    keep_all,
)

# Replicas of a stage that one request may try: a request that kills replicas must not kill a pool.
ATTEMPTS = 4


@dataclass(frozen=True, slots=True)
class Deadline:
    """A point in time, handed on as the time that is left."""

    at_s: float
    now: Callable[[], float]

    def left_s(self) -> float:
        """Return the seconds left. Raises DeadlineExceeded when there are none."""
        left = self.at_s - self.now()
        if left <= 0:
            raise DeadlineExceeded("timeout_s: the request's time was used up")
        return left


@dataclass(slots=True)
class _Losses:
    """Counts the replicas that were lost under one request."""

    count: int = 0


@dataclass(frozen=True, slots=True)
class _PrefillOutcome:
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
        deadline = Deadline(started_s + request.timeout_s, self.now)
        losses = _Losses()
        selected = await self._select(request, deadline, losses)
        async with self._prefill_for(request, selected, deadline, losses) as (selection, start):
            answer, ttft_s = Answer(request, start.prefilled), 0.0
            chunks = self._stream_chunks(request, selection, start, answer, deadline, losses)
            async with aclosing(chunks) as stream:
                async for chunk in stream:
                    ttft_s = ttft_s or self.now() - started_s
                    if answer.open_samples == 0:
                        report = answer.report(selection, ttft_s, losses.count)
                        if self.local is not None:
                            self.local.learn(request, selection, report, answer.token_ids(0))
                        chunk = structs.replace(chunk, report=report)
                    yield chunk

    async def _stream_chunks(
        self,
        request: Request,
        selection: Selection,
        start: _PrefillOutcome,
        answer: Answer,
        deadline: Deadline,
        losses: _Losses,
    ) -> AsyncGenerator[Chunk, None]:
        """Yield the first token at once, then the decode engine's; replace a lost engine."""
        first = answer.first_chunk()
        if first is not None:  # the client has it, whether the KV has moved or not
            yield first
        steps = start.steps
        for attempts_left in reversed(range(self.attempts)):
            if answer.open_samples == 0:
                return
            replay = answer.start_replay()
            if steps is None:
                ticket = None if start.prefilled is None else start.prefilled.ticket
                steps = self.decoder.decode(request, selection, ticket, replay, deadline.left_s())
            try:
                async with aclosing(steps) as stream:
                    async for step in stream:
                        chunk = answer.add_step(step)
                        start.note_kv(answer)
                        if chunk is not None:
                            yield chunk
            except Diverged:
                pass  # the next one repeats the client's tokens
            except DecodeUnavailable:
                losses.count += 1
                if attempts_left == 0:
                    raise
            steps = None

    @asynccontextmanager
    async def _prefill_for(
        self, request: Request, selection: Selection, deadline: Deadline, losses: _Losses
    ) -> AsyncIterator[tuple[Selection, _PrefillOutcome]]:
        """Prefill the selection, or all of the prompt where it leaves the main model unsure.

        The KV of what is not sent is released first: all of the prompt may need its room.
        """
        if not self._may_recompute(selection):
            async with self._prefill_or_skip(request, selection, deadline, losses) as start:
                yield selection, start
            return
        began_s, asked = self.now(), replace(request, wants_sureness=True)
        async with self._prefill_or_skip(asked, selection, deadline, losses) as start:
            if start.sureness is None or start.sureness >= self.recompute_below:
                yield selection, start
                return
        whole = _whole(selection, Reason.UNSURE_ANSWER)
        whole = replace(whole, discarded_s=self.now() - began_s)
        async with AsyncExitStack() as inside:
            dense = await self._try_dense(inside, request, whole, deadline, losses)
            if dense is not None:
                yield whole, dense
                return
        selection = replace(selection, discarded_s=self.now() - began_s)
        async with self._prefill_or_skip(request, selection, deadline, losses) as start:
            yield selection, start

    def _may_recompute(self, selection: Selection) -> bool:
        """Return True if the prompt is pruned by scores, and engines have room for all of it.

        Under load it is not: dense prompts are what the pools have no room for then.
        """
        if self.recompute_below == 0.0 or selection.mode is PromptMode.DENSE:
            return False
        if selection.plan.reason in {*UNSCORED, Reason.LOAD}:
            return False
        if self.max_model_len is None:
            return True
        # The answer's length was limited for the prompt's: in text mode for that of its text.
        room = self.max_model_len // (2 if selection.mode is PromptMode.TEXT else 1)
        return selection.prompt_tokens < room

    async def _try_dense(
        self,
        inside: AsyncExitStack,
        request: Request,
        whole: Selection,
        deadline: Deadline,
        losses: _Losses,
    ) -> _PrefillOutcome | None:
        """Prefill all of the prompt, in half of the time that is left. None: that failed."""
        try:
            async with asyncio.timeout(deadline.left_s() / 2):
                dense = self._prefill_or_skip(request, whole, deadline, losses, attempts=1)
                return await inside.enter_async_context(dense)
        except (Overloaded, Unavailable, DeadlineExceeded, TimeoutError):
            return None  # the pruned prompt's answer is better than none

    @asynccontextmanager
    async def _prefill_or_skip(
        self,
        request: Request,
        selection: Selection,
        deadline: Deadline,
        losses: _Losses,
        attempts: int | None = None,
    ) -> AsyncIterator[_PrefillOutcome]:
        """Prefill in the prefill pool, unless decode computes the prompt."""
        with self._decide_local(request, selection) as local:
            if local and request.wants_sureness:
                replay: Replay = ((),) * request.samples
                steps = self.decoder.decode(request, selection, None, replay, deadline.left_s())
                async with prefetch_first(steps) as decoding:
                    first = await decoding.peek()
                    sureness = None if first is None else first.sureness
                    yield _PrefillOutcome(steps=decoding, sureness=sureness)
                return
            if local:
                yield _PrefillOutcome()
                return
            attempts = attempts or self.attempts
            retrying = self._prefill_with_retry(request, selection, deadline, losses, attempts)
            async with retrying as start:
                yield start

    def _decide_local(self, request: Request, selection: Selection) -> AbstractContextManager[bool]:
        return nullcontext(False) if self.local is None else self.local.decide(request, selection)

    @asynccontextmanager
    async def _prefill_with_retry(
        self,
        request: Request,
        selection: Selection,
        deadline: Deadline,
        losses: _Losses,
        attempts: int,
    ) -> AsyncIterator[_PrefillOutcome]:
        """Prefill, on another engine when one is lost: nothing was sent yet."""
        for attempts_left in reversed(range(attempts)):
            async with AsyncExitStack() as inside:
                try:
                    start = await self._prefill_once(inside, request, selection, deadline)
                except PrefillUnavailable:
                    losses.count += 1
                    if attempts_left == 0:
                        raise
                    continue
                yield start
                return

    async def _prefill_once(
        self, inside: AsyncExitStack, request: Request, selection: Selection, deadline: Deadline
    ) -> _PrefillOutcome:
        """Prefill, and start to decode while the last of the KV is still being computed."""
        prefill = self.prefiller.prefill(request, selection, deadline.left_s())
        prefilling = await inside.enter_async_context(prefill)
        ticket = await prefilling.ticket()
        steps: AsyncGenerator[DecodeStep] | None = None
        if ticket is not None and self.overlap:
            decode = self.decoder.decode(
                request, selection, ticket, ((),) * request.samples, deadline.left_s()
            )
            steps = await inside.enter_async_context(prefetch_first(decode))
        prefilled = await prefilling.result()
        return _PrefillOutcome(prefilling, prefilled, steps, prefilled.sureness)

    async def select(self, request: Request) -> Selection:
        """Return the selection without answering.

        Raises InvalidRequest or DeadlineExceeded.
        """
        deadline = Deadline(self.now() + request.timeout_s, self.now)
        return await self._select(request, deadline, _Losses())

    async def _select(self, request: Request, deadline: Deadline, losses: _Losses) -> Selection:
        """Select tokens, and in text mode write them as a prompt of its own."""
        selection = await self._select_tokens(request, deadline, losses)
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
        return _whole(selection, Reason.NO_GAIN)

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

    async def _select_tokens(
        self, request: Request, deadline: Deadline, losses: _Losses
    ) -> Selection:
        """Select tokens. Losing the speculator costs time, never the answer."""
        if not request.prompt:
            raise InvalidRequest("prompt: must hold at least one token", "prompt")
        plan = plan_of(request)
        if plan.kind is PlanKind.DENSE:
            return keep_all(len(request.prompt), plan)
        left_s, asked_s = deadline.left_s(), self.now()
        timeout_s = min(left_s, self.patience.seconds(len(request.prompt)))
        try:
            return await self._score(request, plan, asked_s, timeout_s, losses)
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
        self, request: Request, plan: Plan, asked_s: float, timeout_s: float, losses: _Losses
    ) -> Selection:
        """Ask a speculator, and another one when it is lost."""
        left_s, attempts_left = timeout_s, self.attempts
        while True:
            try:
                return await self.speculator.select(request, plan, left_s)
            except SpeculatorLost:
                losses.count += 1
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


def _whole(selection: Selection, reason: Reason) -> Selection:
    """Return a pruned selection with all of the prompt in place of what was kept."""
    plan = Plan(PlanKind.DENSE, reason, expected=selection.plan.expected)
    runs = keep_all(selection.prompt_tokens, plan).runs
    return replace(selection, runs=runs, plan=plan, text=None, carried_tokens=0)
