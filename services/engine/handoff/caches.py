"""A worker's KV caches: their layers, layout and blocks."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from vllm.model_executor.models.utils import extract_layer_index

from ...core.errors import UnsupportedModel
from .device import Device
from .layout import KvLayout


class Caches:
    """The caches' layers and layout, for both sides of the hand-off. Thread-safe."""

    def __init__(
        self,
        caches: Mapping[str, torch.Tensor],
        layout: KvLayout,
        device: Device,
        block_size: int,
        fingerprint: str,
    ) -> None:
        """`block_size` is the scheduler's, in tokens. Raises UnsupportedModel."""
        self.layers = {name: extract_layer_index(name) for name in caches}
        self.by_layer = {self.layers[name]: cache for name, cache in caches.items()}
        self.fingerprint = fingerprint
        one = next(iter(caches.values()))
        self.layout = layout
        self.token_bytes = self.layout.token_bytes(one)  # of one layer
        self._device = device
        self._ratio = kernel_blocks(block_size, one.shape[2])
        self._lock = threading.Lock()
        self._tensors: dict[str, torch.Tensor] = {}  # of orders under way

    def block_tensor(self, order_id: str, blocks: list[int]) -> torch.Tensor:
        """Return the order's cache pages, `[pages]` int64 on the device; made once an order.

        On the stream of the thread that asks first.
        """
        with self._lock:
            if order_id not in self._tensors:
                pages = torch.tensor(blocks)
                if self._ratio > 1:
                    inside = torch.arange(self._ratio)
                    pages = (pages[:, None] * self._ratio + inside).flatten()
                self._tensors[order_id] = self._device.upload(pages)
            return self._tensors[order_id]

    def forget(self, order_id: str) -> None:
        """Drop what was made for an order that is over. Idempotent."""
        with self._lock:
            self._tensors.pop(order_id, None)


def kernel_blocks(block_size: int, page_tokens: int) -> int:
    """Return the number of cache pages in one of the scheduler's blocks.

    vLLM lays caches out by the attention kernel's own block size, which may divide the
    scheduler's. Raises UnsupportedModel where it does not.
    """
    ratio, rest = divmod(block_size, page_tokens)
    if ratio == 0 or rest:
        raise UnsupportedModel(
            f"block_size ({block_size}) is not a multiple of the attention backend's pages "
            f"({page_tokens} tokens): their KV cannot be handed over"
        )
    return ratio
