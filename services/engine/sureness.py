"""How sure the main model is of an answer's first token, from the engine's own logprobs.

It is the highest probability of any token, not that of the sampled one: a high temperature is no
doubt. An engine reports raw logprobs unless `logprobs_mode` is another: before temperature, but of
the tokens that a grammar allows. Where one token is allowed, every model is sure.
"""

from __future__ import annotations

import math

from msgspec import structs
from vllm.sampling_params import SamplingParams

from ..core.types import Chunk


def can_ask(params: SamplingParams) -> bool:
    """Return True if the likeliest token can be reported: an engine reports chosen ones alone."""
    return not params.logprob_token_ids


def ask_sureness(params: SamplingParams) -> None:
    """Let the engine report the likeliest token beside the sampled one."""
    if params.logprobs is None or params.logprobs == 0:
        params.logprobs = 1


def sureness_of(chunk: Chunk) -> float | None:
    """Return the highest probability of any first token of `chunk`; None: it has no logprobs."""
    if not chunk.logprobs:
        return None
    return math.exp(max(candidate.logprob for candidate in chunk.logprobs[0]))


def with_asked_logprobs(chunk: Chunk, asked: int | None) -> Chunk:
    """Return the chunk with the logprobs that the caller asked for: vLLM's `logprobs`."""
    if chunk.logprobs is None or (asked is not None and asked != 0):
        return chunk
    if asked is None:
        return structs.replace(chunk, logprobs=None)
    sampled = zip(chunk.token_ids, chunk.logprobs, strict=True)
    only = (tuple(each for each in step if each.token_id == token) for token, step in sampled)
    return structs.replace(chunk, logprobs=tuple(only))
