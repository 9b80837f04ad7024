"""Recurrent layers' states as rows of bytes, which travel like tokens.

A state is one page of its layer's cache: the last inputs of the convolution and the state itself,
in vLLM's own order and types. Its rows, the last of them filled up with zeros, follow the last
token that is handed over: frame `[tokens + i, tokens + j)` of the layer is rows `[i, j)`.
"""

from __future__ import annotations

import torch

ROW_BYTES = 4096


class StateCache:
    """One recurrent layer's cache: a state in every block."""

    def __init__(self, cache: torch.Tensor) -> None:
        """`cache` is vLLM's view of the layer's pages, `[block, 1, 1, content]`, of any type."""
        pages = cache.flatten(1) if cache.dim() > 2 else cache  # [block, content]
        self._pages = pages.view(torch.uint8)
        self._bytes = self._pages.shape[1]
        self.rows = -(-self._bytes // ROW_BYTES)

    def read(self, block: int, start: int, stop: int) -> torch.Tensor:
        """Return rows `[start, stop)` of `block`'s state, `[stop - start, ROW_BYTES]` uint8."""
        out = self._pages.new_zeros((stop - start) * ROW_BYTES)
        found = self._pages[block, start * ROW_BYTES : stop * ROW_BYTES]
        out[: len(found)] = found
        return out.view(-1, ROW_BYTES)

    def write(self, block: int, start: int, rows: torch.Tensor) -> None:
        """Put `rows`, `[n, ROW_BYTES]` uint8 on the cache's device, from row `start` on."""
        target = self._pages[block, start * ROW_BYTES :]
        raw = rows.flatten()[: len(target)]
        target[: len(raw)] = raw
