"""Reads and writes KV in the canonical order `[token, part, head, dim]`, whatever the pages.

The parts are a key and a value, or one: the latent of MLA layers, which all heads share.

The wire knows tokens, not pages: it trims the last block, fits another block size on the
other side, and skips what the other side has in its cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

import torch
from vllm.config import VllmConfig
from vllm.version import __version__ as vllm_version

from ...kv.shards import Split
from ..vllm_internals import cpu_attention_isa


class KvLayout(Protocol):
    """One engine's page layout. A layer's cache is vLLM's view `[block, head, slot, parts*dim]`."""

    parts: int  # 2: key and value; 1: a latent

    def token_bytes(self, cache: torch.Tensor) -> int:
        """Return the bytes of one token's KV in one layer."""
        ...

    def read(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """Return tokens `[start, stop)` as `[stop - start, parts, heads, dim]`, contiguous."""
        ...

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, kv: torch.Tensor
    ) -> None:
        """Put `kv`, `[n, parts, heads, dim]` on the cache's device, at `[start, start + n)`."""
        ...


class RowLayout:
    """Pages with a row per head and token, part after part.

    vLLM's GPU backends present keys and values so, and the latents of MLA layers on every device.
    """

    def __init__(self, cache: torch.Tensor, parts: int = 2) -> None:
        self.parts = parts
        self._block_size = cache.shape[2]

    def token_bytes(self, cache: torch.Tensor) -> int:
        """See KvLayout."""
        return int(cache.shape[1] * cache.shape[3] * cache.itemsize)

    def read(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """See KvLayout."""
        block, slot = self._place(blocks, start, stop)
        rows = cache[block, :, slot]  # [n, heads, parts*dim]
        return rows.unflatten(-1, (self.parts, -1)).transpose(1, 2).contiguous()

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, kv: torch.Tensor
    ) -> None:
        """See KvLayout."""
        block, slot = self._place(blocks, start, start + kv.shape[0])
        cache[block, :, slot] = kv.transpose(1, 2).flatten(-2)

    def _place(
        self, blocks: torch.Tensor, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.arange(start, stop, device=blocks.device)
        return blocks[tokens // self._block_size], tokens % self._block_size


class CpuLayout:
    """vLLM's CPU pages: per (block, head) all k values, then all v values, k packed per ISA.

    Where a value lies inside a page is learnt once, by writing counters through vLLM's own
    cache-write operation, so that no packing is assumed.
    """

    parts = 2

    def __init__(self, cache: torch.Tensor) -> None:
        _, self._heads, self._block_size, width = cache.shape
        self._dim = width // 2
        self._isa = cpu_attention_isa(cache.dtype, self._block_size, self._dim)
        key_index, value_index = self._learn(cache.dtype)
        self._index = (key_index, value_index)
        self._strides = (_affine_strides(key_index), _affine_strides(value_index))

    def token_bytes(self, cache: torch.Tensor) -> int:
        """See KvLayout."""
        return int(cache.shape[1] * cache.shape[3] * cache.itemsize)

    def read(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, stop: int
    ) -> torch.Tensor:
        """See KvLayout."""
        first, last = start // self._block_size, (stop - 1) // self._block_size
        pages = cache.view(*cache.shape[:2], 2, -1)[blocks[first : last + 1]]
        out = torch.empty(stop - start, 2, self._heads, self._dim, dtype=cache.dtype)
        offset = start - first * self._block_size
        for which in (0, 1):
            tokens = self._unpack(pages, which)  # [blocks, heads, slot, dim]
            flat = tokens.transpose(1, 2).flatten(0, 1)
            out[:, which] = flat[offset : offset + stop - start]
        return out

    def write(
        self, cache: torch.Tensor, blocks: torch.Tensor, start: int, kv: torch.Tensor
    ) -> None:
        """See KvLayout."""
        tokens = torch.arange(start, start + kv.shape[0])
        slots = blocks[tokens // self._block_size] * self._block_size + tokens % self._block_size
        self._store(cache, kv[:, 0].contiguous(), kv[:, 1].contiguous(), slots)

    def _unpack(self, pages: torch.Tensor, which: int) -> torch.Tensor:
        """Return a view or copy `[n, heads, slot, dim]` of `pages`, `[n, heads, 2, slot*dim]`."""
        part = pages[:, :, which]
        strides = self._strides[which]
        if strides is None:
            shape = (*part.shape[:2], self._block_size, self._dim)
            return part[:, :, self._index[which].flatten()].view(shape)
        size = (*part.shape[:2], self._block_size, self._dim)
        return part.as_strided(size, (*part.stride()[:2], *strides), part.storage_offset())

    def _learn(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `[slot, dim]` int64 for k and for v: each value's place in its page part."""
        slots, dims = torch.arange(self._block_size), torch.arange(self._dim)
        by_slot = slots[:, None].expand(-1, self._dim)
        by_dim = dims[None, :].expand(self._block_size, -1)
        token_at, dim_at = (self._fill(counters, dtype) for counters in (by_slot, by_dim))
        key_index, value_index = (
            torch.argsort(token * self._dim + dim).view(self._block_size, self._dim)
            for token, dim in zip(token_at, dim_at, strict=True)
        )
        return key_index, value_index

    def _fill(self, counters: torch.Tensor, dtype: torch.dtype) -> list[torch.Tensor]:
        page = torch.zeros(1, 1, self._block_size, 2 * self._dim, dtype=dtype)
        values = counters.to(dtype)[:, None, :].contiguous()
        self._store(page, values, values, torch.arange(self._block_size))
        parts = page.view(1, 1, 2 * self._block_size, self._dim).chunk(2, dim=2)
        return [part.reshape(-1).long() for part in parts]

    def _store(
        self, cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor
    ) -> None:
        from vllm import _custom_ops as ops

        halves = cache.view(*cache.shape[:2], 2 * self._block_size, self._dim).chunk(2, dim=2)
        ops.cpu_attn_reshape_and_cache(key, value, *halves, slots, self._isa)


def _affine_strides(index: torch.Tensor) -> tuple[int, int] | None:
    """Return strides (slot, dim) when `index[s, d] == s*a + d*b`: a view reads it, no gather."""
    slot_stride = int(index[1, 0] - index[0, 0])
    dim_stride = int(index[0, 1] - index[0, 0])
    slots, dims = (torch.arange(size) for size in index.shape)
    if bool((index == slots[:, None] * slot_stride + dims[None, :] * dim_stride).all()):
        return slot_stride, dim_stride
    return None


def layout_of(cache: torch.Tensor, *, latent: bool) -> KvLayout:
    """Return the layout of an engine's caches, read from one layer's cache."""
    if latent:
        return RowLayout(cache, parts=1)
    return CpuLayout(cache) if cache.device.type == "cpu" else RowLayout(cache)


def fingerprint(
    config: VllmConfig,
    holder: Split,
    cache: torch.Tensor,
    layout: KvLayout,
    adapters: Sequence[str],
) -> str:
    """Return a fingerprint of what two engines must agree on for KV to pass between them.

    Model, revision, its adapters (name=path each), dtypes, parts and their size, vLLM's version,
    and how the prefill engine (`holder`) splits the model; not the block size and not the page
    packing, which the canonical order hides, and not the decode engine's split.
    """
    model = config.model_config
    parts = (
        vllm_version,
        model.model,
        str(model.revision),
        str(model.dtype),
        str(cache.dtype),
        str(config.cache_config.cache_dtype),
        str(model.quantization),
        str(holder),
        f"{layout.parts} x {cache.shape[3] // layout.parts}",
        *adapters,
    )
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
