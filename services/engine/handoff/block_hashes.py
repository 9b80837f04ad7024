"""Prefix-cache hashes that include token positions.

vLLM hashes a block by its token ids and its predecessor. A pruned prompt has the same ids
as some dense prompt, but its KV was computed at other positions, so from the first gap on
every block is hashed with its positions as well. Blocks before the gap keep their hashes:
a shared system prompt hits across pruned and dense requests.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from vllm.utils.hashing import get_hash_fn_by_name
from vllm.v1.core.kv_cache_utils import generate_block_hash_extra_keys, hash_block_tokens
from vllm.v1.request import Request

from ...core.positions import PositionMap
from ..params import positions_of
from ..vllm_internals import block_hasher, replace_block_hasher


class PositionHasher:
    """Hashes a sparse request's blocks; blocks are of `block_size` tokens."""

    def __init__(self, block_size: int, hash_algorithm: str) -> None:
        self._block_size = block_size
        self._hash = get_hash_fn_by_name(hash_algorithm)

    def rehash(self, request: Request) -> None:
        """Replace the hashes from the first gap on, and hash future blocks alike."""
        mapping = positions_of(request.sampling_params)
        if block_hasher(request) is None or mapping is None or mapping.is_identity:
            return
        del request.block_hashes[mapping.dense_slots // self._block_size :]
        replace_block_hasher(request, _RequestHasher(self._block_size, self._hash, mapping))
        request.update_block_hashes()


class _RequestHasher:
    """The callable by which vLLM hashes a request's new full blocks."""

    def __init__(self, block_size: int, hash_function: Any, mapping: PositionMap) -> None:
        self._block_size = block_size
        self._hash = hash_function
        self._mapping = mapping

    def __call__(self, request: Request) -> list[Any]:
        hashes: list[Any] = []
        done = len(request.block_hashes)
        previous = request.block_hashes[-1] if done else None
        for block in range(done, request.num_tokens // self._block_size):
            start, stop = block * self._block_size, (block + 1) * self._block_size
            extra, _ = generate_block_hash_extra_keys(request, start, stop, 0)
            keys = (*(extra or ()), *self._position_key(start, stop)) or None
            tokens = request.all_token_ids[start:stop]
            previous = hash_block_tokens(self._hash, previous, tokens, keys)
            hashes.append(previous)
        return hashes

    def _position_key(self, start: int, stop: int) -> tuple[Any, ...]:
        positions = self._mapping.positions(start, stop)
        if np.array_equal(positions, np.arange(start, stop)):
            return ()  # every slot is its own position
        return (("positions", positions.tobytes()),)
