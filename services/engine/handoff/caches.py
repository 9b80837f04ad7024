"""A worker's KV caches: their layers, layout and blocks."""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from vllm.model_executor.models.utils import extract_layer_index

from ...core.errors import UnsupportedModel
from .device import Device
from .groups import KvGroups
from .layout import KvLayout
from .states import StateCache

# A layer's frames bear its index; those of a layer's recurrent state, its index beyond this one:
# a layer may have both attention and a state.
_STATES = 1 << 16
_NULL_BLOCK = 0  # vLLM's place holder in block tables


class Caches:
    """The caches' layers and layout, for both sides of the hand-off. Thread-safe."""

    def __init__(
        self,
        caches: Mapping[str, torch.Tensor],
        layout: KvLayout,
        device: Device,
        groups: KvGroups,
        fingerprint: str,
    ) -> None:
        """`layout` is that of the layers with keys and values. Raises UnsupportedModel."""
        states = {name for name in caches if groups.recurrent[groups.of_layer[name]]}
        self.layers = {name: extract_layer_index(name) for name in caches if name not in states}
        self.by_layer = {layer: caches[name] for name, layer in self.layers.items()}
        if len(self.by_layer) < len(self.layers):
            raise UnsupportedModel("a layer has several caches: their KV cannot be handed over")
        self.states = {
            _STATES + extract_layer_index(name): StateCache(caches[name]) for name in sorted(states)
        }
        self.fingerprint = fingerprint
        one = next(iter(self.by_layer.values()))
        self.layout = layout
        self.token_bytes = self.layout.token_bytes(one)  # of one layer
        self._groups = {layer: groups.of_layer[name] for name, layer in self.layers.items()}
        self._groups |= {
            _STATES + extract_layer_index(name): groups.of_layer[name] for name in states
        }
        self._device = device
        self._ratio = kernel_blocks(groups.block_size, one.shape[2])
        self._lock = threading.Lock()
        self._tensors: dict[str, dict[int, torch.Tensor]] = {}  # of orders under way, by group

    def block_tensor(self, order_id: str, layer: int, blocks: list[list[int]]) -> torch.Tensor:
        """Return the pages of an order's layer, `[pages]` int64 on the device.

        `blocks` is the order's, by group. Made once an order and group, on the stream of the
        thread that asks first.
        """
        group = self._groups[layer]
        with self._lock:
            tensors = self._tensors.setdefault(order_id, {})
            if group not in tensors:
                pages = torch.tensor(blocks[group])
                if self._ratio > 1:
                    inside = torch.arange(self._ratio)
                    pages = (pages[:, None] * self._ratio + inside).flatten()
                tensors[group] = self._device.upload(pages)
            return tensors[group]

    def state_block(self, layer: int, blocks: list[list[int]]) -> int | None:
        """Return the block of an order that holds a recurrent layer's state; None without one."""
        found = blocks[self._groups[layer]]
        return found[0] if found and found[0] != _NULL_BLOCK else None

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
