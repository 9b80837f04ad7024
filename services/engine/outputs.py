"""vLLM's outputs as the pipeline's chunks, and its sampling parameters off the wire."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec
from vllm.logprobs import Logprob
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams

from ..core.errors import InvalidRequest, Unavailable
from ..core.types import Chunk, TokenLogprob


def sampling_params(wire: bytes) -> SamplingParams:
    """Decode `Request.sampling`. Raises InvalidRequest when it is not SamplingParams."""
    try:
        return msgspec.msgpack.decode(wire, type=SamplingParams)
    except msgspec.MsgspecError as error:
        raise InvalidRequest(f"sampling: {error}", "sampling") from error


def chunk_of(output: RequestOutput, index: int, cached_tokens: int) -> Chunk:
    """Return the delta in `output` (of one sample) as sample `index`'s chunk."""
    completion = output.outputs[0]
    return Chunk(
        index=index,
        token_ids=tuple(completion.token_ids),
        text=completion.text,
        logprobs=_logprobs(completion.logprobs),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
        cached_tokens=cached_tokens,
    )


def check_ended_well(params: SamplingParams, finish_reason: str | None, lost: Unavailable) -> None:
    """Raise `lost` where the engine gave a request up; InvalidRequest where its grammar did.

    The engine ends a request with an error when no token satisfies its grammar: nothing to
    generate (`{"$ref": "#"}`), or a grammar that does not compile. That fails everywhere again.
    """
    if finish_reason == "error" and params.structured_outputs is not None:
        raise InvalidRequest(
            "structured_outputs: no token satisfies the constraint of response_format, tools or "
            "structured_outputs; check the schema or grammar",
            "structured_outputs",
        )
    if finish_reason in {"abort", "error"}:
        raise lost


def prompt_logprobs_of(
    output: RequestOutput,
) -> tuple[tuple[TokenLogprob, ...] | None, ...] | None:
    """Return the prompt's logprobs, `[N]`, if asked for; the first token has none.

    vLLM's deltas after the one that carries them have an empty list.
    """
    if not output.prompt_logprobs:
        return None
    return tuple(
        None if candidates is None else _candidates(candidates)
        for candidates in output.prompt_logprobs
    )


def prefill_times(output: RequestOutput) -> tuple[float, float]:
    """Return seconds in the engine's queue and in its prefill, by the engine's own clock."""
    stats = output.metrics
    if stats is None:
        return 0.0, 0.0
    return stats.scheduled_ts - stats.queued_ts, stats.first_token_ts - stats.scheduled_ts


def _logprobs(
    logprobs: Sequence[Mapping[int, Logprob]] | None,
) -> tuple[tuple[TokenLogprob, ...], ...] | None:
    return None if logprobs is None else tuple(_candidates(step) for step in logprobs)


def _candidates(step: Mapping[int, Logprob]) -> tuple[TokenLogprob, ...]:
    return tuple(
        TokenLogprob(token, entry.logprob, entry.rank, entry.decoded_token)
        for token, entry in step.items()
    )
