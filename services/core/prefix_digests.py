"""Digests of a prompt's prefixes, computed once per request; equal digests, equal prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import xxhash

from .types import Request

BLOCK_TOKENS = 128  # a multiple of most engines' block size: so that a match here is a match there


def prefix_digests(
    tokens: Sequence[int], block_tokens: int = BLOCK_TOKENS, domain: str | None = None
) -> Iterator[int]:
    """Yield one digest per whole block; each stands for all tokens up to its block's end.

    `tokens` is `[N]`; a digest has 64 bits. Prompts of different domains have none in common.
    """
    packed = np.asarray(tokens, dtype=np.uint32)
    digest = 0 if domain is None else xxhash.xxh3_64_intdigest(domain.encode())
    for start in range(0, len(packed) - block_tokens + 1, block_tokens):
        block = packed[start : start + block_tokens].tobytes()
        digest = xxhash.xxh3_64_intdigest(block, seed=digest)
        yield digest


def cache_domain(adapter: str | None, cache_salt: str | None) -> str | None:
    """Return what stands for all requests that share caches; None: with neither of both."""
    if adapter is None and cache_salt is None:
        return None
    return repr((adapter, cache_salt))


def digests_of(request: Request) -> tuple[int, ...]:
    """Return the digests of the request's prompt; compute them unless it carries them."""
    if request.digests is not None:
        return request.digests
    domain = cache_domain(request.adapter, request.cache_salt)
    return tuple(prefix_digests(request.prompt, domain=domain))
