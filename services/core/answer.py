"""Joins the outputs of several engines into one answer, each token once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import structs

from .types import (
    Chunk,
    DecodeStep,
    LocalPrefillTimes,
    PlanKind,
    PrefilledBy,
    PrefillResult,
    PromptMode,
    Replay,
    Report,
    Request,
    Selection,
)


class Diverged(Exception):
    """A decode engine that was left to sample freely chose other tokens than the client has."""


@dataclass(slots=True)
class _Sample:
    """One sample: the tokens its client has, and how many a decode engine will repeat."""

    token_ids: list[int] = field(default_factory=list)
    chars: int = 0
    tokens_to_skip: int = 0
    chars_to_skip: int = 0
    decoding: bool = False  # a decode engine has started it
    finished: bool = False

    def append(self, chunk: Chunk) -> None:
        self.token_ids += chunk.token_ids
        self.chars += len(chunk.text)
        self.finished |= chunk.is_finished

    def without_repeated(self, chunk: Chunk) -> Chunk:
        """Return the part of `chunk` that the client lacks. Raises Diverged if the rest differs."""
        if self.tokens_to_skip == 0 and self.chars_to_skip == 0:
            return chunk
        tokens = min(self.tokens_to_skip, len(chunk.token_ids))
        place = len(self.token_ids) - self.tokens_to_skip
        if list(chunk.token_ids[:tokens]) != self.token_ids[place : place + tokens]:
            raise Diverged
        chars = min(self.chars_to_skip, len(chunk.text))
        self.tokens_to_skip -= tokens
        self.chars_to_skip -= chars
        return structs.replace(
            chunk,
            token_ids=chunk.token_ids[tokens:],
            text=chunk.text[chars:],
            logprobs=None if chunk.logprobs is None else chunk.logprobs[tokens:],
        )

    def start_over(self) -> tuple[int, ...]:
        """Expect a new decode engine to repeat every token so far; return those tokens."""
        self.tokens_to_skip, self.chars_to_skip = len(self.token_ids), self.chars
        return tuple(self.token_ids)


class Answer:
    """One request's samples, from the first token to the report.

    `prefilled` None: the decode engine computes the prompt and sends every token.
    """

    def __init__(self, request: Request, prefilled: PrefillResult | None) -> None:
        self._request = request
        self._prefilled = prefilled
        self._samples = [_Sample() for _ in range(request.samples)]
        self.open_samples = request.samples  # that have not finished
        self.kv_arrived = False  # True: a decode engine has the KV for every sample
        self._transfer_s = 0.0
        self._first_decode_s = 0.0
        self._recomputed = False
        self._computed = LocalPrefillTimes(0.0, 0.0)
        first = None if prefilled is None else prefilled.first
        self._cached_tokens = 0 if first is None else first.cached_tokens
        self._prompt_logprobs = None if first is None else first.prompt_logprobs  # until sent

    @property
    def is_started(self) -> bool:
        """True once the client has a token."""
        return any(sample.token_ids for sample in self._samples)

    def token_ids(self, index: int) -> Sequence[int]:
        """Return the output tokens of a sample so far."""
        return self._samples[index].token_ids

    def first_chunk(self) -> Chunk | None:
        """Return the first token, unless a stop string or half a character holds it back."""
        if self._prefilled is None:
            return None
        first = self._prefilled.first
        if self._prefilled.ticket is None:
            # One sample: this is its end. Several: decode computes the prompt for all.
            return self._send(first) if self._request.samples == 1 else None
        if self._request.hold_back_chars > 0 or not first.text or "\ufffd" in first.text:
            return None
        return self._send(first)

    def start_replay(self) -> Replay:
        """Start a decode engine over: return the tokens to repeat, at least the first token."""
        repeated = [sample.start_over() for sample in self._samples]
        if not repeated[0] and self._prefilled is not None:
            repeated[0] = self._prefilled.first.token_ids
        return tuple(repeated)

    def add_step(self, step: DecodeStep) -> Chunk | None:
        """Return the part of a decode step that is new to the client, if any. Raises Diverged."""
        if step.transfer_s is not None:
            # One sample pulls the prompt's KV, the others what its blocks do not share.
            self._transfer_s = max(self._transfer_s, step.transfer_s)
        if step.first_decode_s is not None:
            self._first_decode_s = step.first_decode_s
        self._recomputed |= step.recomputed
        if self._prefilled is None:
            self._computed = step.computed or self._computed
            self._cached_tokens = max(self._cached_tokens, step.chunk.cached_tokens)
        sample = self._samples[step.chunk.index]
        if not sample.decoding:
            sample.decoding = True
            self.kv_arrived = all(each.decoding or each.finished for each in self._samples)
        if sample.finished:
            return None  # it had finished before its engine was lost
        chunk = sample.without_repeated(step.chunk)
        return self._send(chunk) if chunk.token_ids or chunk.text or chunk.is_finished else None

    def report(self, selection: Selection, ttft_s: float, retries: int = 0) -> Report:
        """Return the request's report, once the last sample has finished."""
        by, times = (
            (PrefilledBy.DECODE, self._computed)
            if self._prefilled is None
            else (PrefilledBy.PREFILL, self._prefilled)
        )
        return Report(
            plan=PlanKind.DENSE if selection.mode is PromptMode.DENSE else PlanKind.PRUNE,
            reason=selection.plan.reason,
            prompt_tokens=selection.prompt_tokens,
            kept_tokens=selection.kept_tokens,
            keep_rate=selection.keep_rate,
            queue_s=selection.queue_s + times.queue_s,
            speculate_s=selection.speculate_s,
            prefill_s=times.prefill_s,
            transfer_s=self._transfer_s,
            first_decode_s=self._first_decode_s,
            ttft_s=ttft_s,
            recomputed=self._recomputed,
            retries=retries,
            cached_tokens=self._cached_tokens,
            expected=selection.plan.expected,
            remembered_tokens=selection.remembered_tokens,
            carried_tokens=selection.carried_tokens,
            prefilled_by=by,
            mode=selection.mode,
            text_tokens=None if selection.text is None else len(selection.text),
            discarded_s=selection.discarded_s,
        )

    def _send(self, chunk: Chunk) -> Chunk:
        self._samples[chunk.index].append(chunk)
        self.open_samples -= chunk.is_finished
        if chunk.cached_tokens != self._cached_tokens:
            chunk = structs.replace(chunk, cached_tokens=self._cached_tokens)
        if self._prompt_logprobs is not None:
            chunk = structs.replace(chunk, prompt_logprobs=self._prompt_logprobs)
            self._prompt_logprobs = None
        return chunk
