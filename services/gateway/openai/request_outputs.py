"""Converts the pipeline's chunks to vLLM's request outputs."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind

from ...core.types import Chunk, TokenLogprob

Logprobs = list[dict[int, Logprob]]
PromptLogprobs = list[dict[int, Logprob] | None]


@dataclass(slots=True)
class _SampleOutput:
    """Everything one sample has produced so far."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    last: Chunk | None = None

    def add(self, chunk: Chunk) -> None:
        self.texts.append(chunk.text)
        self.token_ids.extend(chunk.token_ids)
        if chunk.logprobs is not None:
            self.logprobs = [] if self.logprobs is None else self.logprobs
            self.logprobs.extend(_logprobs(chunk))
        self.last = chunk

    def output(self) -> CompletionOutput:
        return CompletionOutput(
            self.index,
            "".join(self.texts),
            list(self.token_ids),
            _cumulative_logprob(self.logprobs, self.token_ids),
            self.logprobs,
            finish_reason=None if self.last is None else self.last.finish_reason,
            stop_reason=None if self.last is None else self.last.stop_reason,
        )


class OutputAssembler:
    """Builds one request's outputs of the requested kind: deltas, cumulative, or final."""

    def __init__(
        self,
        request_id: str,
        prompt_text: str | None,
        prompt_token_ids: list[int],  # the caller's whole prompt: usage counts it
        samples: int,
        kind: RequestOutputKind,
    ) -> None:
        self._request_id = request_id
        self._prompt_text = prompt_text
        self._prompt_token_ids = prompt_token_ids
        self._kind = kind
        self._samples = [_SampleOutput(index) for index in range(samples)]
        self._open = samples
        self._cached_tokens = 0
        self._prompt_logprobs: PromptLogprobs | None = None  # in the request's first chunk
        self._started: set[int] = set()  # samples that have had an output

    @property
    def is_finished(self) -> bool:
        """True once every sample has its finish reason."""
        return self._open == 0

    def add(self, chunk: Chunk) -> RequestOutput | None:
        """Return the caller's next output after `chunk`; None: nothing yet."""
        self._open -= chunk.is_finished
        self._cached_tokens = max(self._cached_tokens, chunk.cached_tokens)
        if chunk.prompt_logprobs is not None:
            self._prompt_logprobs = [
                None if position is None else _candidates(position)
                for position in chunk.prompt_logprobs
            ]
        if self._kind is RequestOutputKind.DELTA:
            return self._output([_delta_output(chunk)], self._prompt_logprobs_for(chunk.index))
        sample = self._samples[chunk.index]
        sample.add(chunk)
        if self._kind is RequestOutputKind.CUMULATIVE:
            return self._output([sample.output()], self._prompt_logprobs)
        if not self.is_finished:
            return None
        return self._output([each.output() for each in self._samples], self._prompt_logprobs)

    def _prompt_logprobs_for(self, index: int) -> PromptLogprobs | None:
        """Return the prompt's logprobs for a sample's first delta, where vLLM expects them."""
        if index in self._started:
            return None
        self._started.add(index)
        return self._prompt_logprobs

    def _output(
        self, outputs: list[CompletionOutput], prompt_logprobs: PromptLogprobs | None
    ) -> RequestOutput:
        return RequestOutput(
            self._request_id,
            self._prompt_text,
            self._prompt_token_ids,
            prompt_logprobs,
            outputs,
            self.is_finished,
            num_cached_tokens=self._cached_tokens,
        )


def _delta_output(chunk: Chunk) -> CompletionOutput:
    logprobs = None if chunk.logprobs is None else _logprobs(chunk)
    return CompletionOutput(
        chunk.index,
        chunk.text,
        list(chunk.token_ids),
        _cumulative_logprob(logprobs, chunk.token_ids),
        logprobs,
        finish_reason=chunk.finish_reason,
        stop_reason=chunk.stop_reason,
    )


def _logprobs(chunk: Chunk) -> Logprobs:
    return [_candidates(position) for position in chunk.logprobs or ()]


def _candidates(position: tuple[TokenLogprob, ...]) -> dict[int, Logprob]:
    return {each.token_id: Logprob(each.logprob, each.rank, each.text) for each in position}


def _cumulative_logprob(
    logprobs: Logprobs | None, token_ids: list[int] | tuple[int, ...]
) -> float | None:
    if logprobs is None:
        return None
    pairs = zip(logprobs, token_ids, strict=False)
    return float(sum(position[token].logprob for position, token in pairs if token in position))
