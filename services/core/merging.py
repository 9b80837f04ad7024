"""Chunks of one answer that are ready together become one: fewer messages, fewer writes."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import structs

from .types import Chunk


def merge_chunks(chunks: Sequence[Chunk]) -> Sequence[Chunk]:
    """Return the chunks, with those of one sample that follow each other as one."""
    if len(chunks) == 1:
        return chunks
    merged = [chunks[0]]
    for chunk in chunks[1:]:
        if chunk.index == merged[-1].index and chunk.prompt_logprobs is None:
            merged[-1] = _join(merged[-1], chunk)
        else:
            merged.append(chunk)
    return merged


def _join(first: Chunk, second: Chunk) -> Chunk:
    logprobs = first.logprobs
    if second.logprobs is not None:
        logprobs = (*(logprobs or ()), *second.logprobs)
    return structs.replace(
        second,
        token_ids=first.token_ids + second.token_ids,
        text=first.text + second.text,
        logprobs=logprobs,
        cached_tokens=max(first.cached_tokens, second.cached_tokens),
        prompt_logprobs=first.prompt_logprobs,
    )
