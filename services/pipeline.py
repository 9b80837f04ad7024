"""One request's way through the three pools. Knows ports, not frameworks."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, replace

from .errors import DeadlineExceeded, InvalidRequest, SpeculatorUnavailable
from .plan import Planner
from .ports import Decoder, Prefiller, Speculator
from .types import (
    Chunk,
    Decoded,
    PlanKind,
    Prefilled,
    Reason,
    Report,
    Request,
    Selection,
    dense,
)


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
    now: Callable[[], float] = field(default=time.monotonic)

    async def generate(self, request: Request) -> AsyncIterator[Chunk]:
        """Stream the answer's chunks; the last one carries the report.

        Raises InvalidRequest, DeadlineExceeded, Overloaded, PrefillUnavailable or
        DecodeUnavailable. Closing the iterator releases all three pools.
        """
        started_s = self.now()
        deadline = Deadline(started_s + request.timeout_s, self.now)
        selection = await self._select(request, deadline)
        async with self.prefiller.prefill(request, selection, deadline.left_s()) as prefilled:
            answer = _Answer(request, prefilled)
            for chunk in answer.early():  # the client has it before the KV moves
                yield self._told(chunk, answer, selection, started_s)
            if answer.open_samples == 0:
                return
            tokens = self.decoder.decode(request, selection, prefilled, deadline.left_s())
            async with aclosing(tokens) as steps:  # type: ignore[type-var]
                async for step in steps:
                    for chunk in answer.feed(step):
                        yield self._told(chunk, answer, selection, started_s)

    async def select(self, request: Request) -> Selection:
        """Which tokens would be kept, without answering.

        Raises InvalidRequest or DeadlineExceeded.
        """
        return await self._select(request, Deadline(self.now() + request.timeout_s, self.now))

    async def _select(self, request: Request, deadline: Deadline) -> Selection:
        """Losing the speculator costs time, never the answer: the prompt goes dense."""
        if not request.prompt:
            raise InvalidRequest("prompt: must hold at least one token", "prompt")
        plan = self.planner.plan(request)
        if plan.kind is PlanKind.DENSE:
            return dense(len(request.prompt), plan.reason)
        left_s = deadline.left_s()
        try:
            return await self.speculator.select(
                request, plan, min(left_s, self.speculate_timeout_s)
            )
        except SpeculatorUnavailable:
            return dense(len(request.prompt), Reason.SPECULATOR_UNAVAILABLE)
        except DeadlineExceeded:
            if left_s <= self.speculate_timeout_s:
                raise
            return dense(len(request.prompt), Reason.SPECULATOR_TIMEOUT)

    def _told(self, chunk: Chunk, answer: _Answer, selection: Selection, started_s: float) -> Chunk:
        if answer.ttft_s is None:
            answer.ttft_s = self.now() - started_s
            chunk = replace(chunk, prompt_logprobs=answer.prompt_logprobs)
        if answer.open_samples > 0:
            return chunk
        return replace(chunk, report=answer.report(selection))


class _Answer:
    """Joins the prefill engine's first token with the decode engine's stream.

    The decode engine repeats the first sample's first token (it must count it); what the
    client already has of it is cut off again here.
    """

    def __init__(self, request: Request, prefilled: Prefilled) -> None:
        self._request = request
        self._prefilled = prefilled
        self.open_samples = request.samples
        self.ttft_s: float | None = None
        self.prompt_logprobs = prefilled.first.prompt_logprobs
        self._tokens_sent = 0
        self._chars_sent = 0
        self._transfer_s = 0.0
        self._first_decode_s = 0.0
        self._recomputed = False

    def early(self) -> list[Chunk]:
        """The first token, unless a stop string or half a character holds it back."""
        first = self._prefilled.first
        if self._prefilled.ticket is None:
            # One sample: this is its end. Several: decode computes the prompt for all.
            self.open_samples -= self._request.samples == 1
            return [first] if self._request.samples == 1 else []
        if self._request.hold_back_chars > 0 or not first.text or "�" in first.text:
            return []
        self._tokens_sent, self._chars_sent = len(first.token_ids), len(first.text)
        return [first]

    def feed(self, step: Decoded) -> list[Chunk]:
        """What of a decode step is new to the client."""
        if step.transfer_s is not None:
            self._transfer_s = step.transfer_s
        if step.first_decode_s is not None:
            self._first_decode_s = step.first_decode_s
        self._recomputed |= step.recomputed
        chunk = replace(step.chunk, cached_tokens=self._prefilled.first.cached_tokens)
        chunk = chunk if chunk.index else self._cut(chunk)
        self.open_samples -= chunk.finished
        return [chunk] if chunk.token_ids or chunk.text or chunk.finished else []

    def _cut(self, chunk: Chunk) -> Chunk:
        tokens = min(self._tokens_sent, len(chunk.token_ids))
        chars = min(self._chars_sent, len(chunk.text))
        if tokens == 0 and chars == 0:
            return chunk
        self._tokens_sent -= tokens
        self._chars_sent -= chars
        return replace(
            chunk,
            token_ids=chunk.token_ids[tokens:],
            text=chunk.text[chars:],
            logprobs=None if chunk.logprobs is None else chunk.logprobs[tokens:],
        )

    def report(self, selection: Selection) -> Report:
        """The whole story, once the last sample has finished."""
        kept_all = selection.kept_tokens == selection.prompt_tokens
        return Report(
            plan=PlanKind.DENSE if kept_all else PlanKind.PRUNE,
            reason=selection.plan.reason,
            prompt_tokens=selection.prompt_tokens,
            kept_tokens=selection.kept_tokens,
            keep_rate=selection.keep_rate,
            queue_s=selection.queue_s + self._prefilled.queue_s,
            speculate_s=selection.speculate_s,
            prefill_s=self._prefilled.prefill_s,
            transfer_s=self._transfer_s,
            first_decode_s=self._first_decode_s,
            ttft_s=self.ttft_s or 0.0,
            recomputed=self._recomputed,
        )
