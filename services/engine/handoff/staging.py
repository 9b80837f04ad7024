"""Copies KV from the cache to the leases, while later layers compute."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from .device import CopyEvent, Device
from .layout import KvLayout
from .orders import Stage
from .ring import BufferRing

logger = logging.getLogger("vllm.specprefill.handoff")


@dataclass(frozen=True, slots=True)
class StagedPiece:
    """KV of tokens `[start, stop)` of one layer in the canonical order, raw.

    `payload` is valid until the sink returns.
    """

    order: Stage
    layer: int
    start: int
    stop: int
    payload: memoryview

    @property
    def ends_chunk(self) -> bool:
        """Whether this is the last piece of the order's chunk in its layer."""
        return self.stop == self.order.stop


class Stager:
    """Gathers KV on the compute stream, copies it out on another, gives it to a sink.

    What is under way never exceeds the ring: a step that stages more waits for the oldest copy
    to reach its lease. The sink runs on a thread of the stager, in order. A copy whose sink fails
    is logged once, and `on_failure` is given its order; the others are not affected.
    """

    def __init__(
        self,
        device: Device,
        ring: BufferRing,
        layout: KvLayout,
        sink: Callable[[StagedPiece], None],
        on_failure: Callable[[Stage], None],
    ) -> None:
        self._stream = device.stream()
        self._ring = ring
        self._layout = layout
        self._sink = sink
        self._on_failure = on_failure
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-seal")  # keeps the order

    def stage(self, order: Stage, layer: int, cache: torch.Tensor, blocks: torch.Tensor) -> None:
        """Copy the order's tokens of one layer. Called after the layer was launched.

        The cache may be overwritten by later launches at once: the gather runs before them, on
        the same stream.
        """
        step = max(1, self._ring.slot_bytes // self._layout.token_bytes(cache))
        for start in range(order.start, order.stop, step):
            stop = min(start + step, order.stop)
            buffer = self._ring.take()
            kv = self._layout.read(cache, blocks, start, stop).view(torch.uint8).flatten()
            into = buffer[: len(kv)]
            copied = self._stream.copy_out(kv, into)
            piece = StagedPiece(order, layer, start, stop, memoryview(into.numpy()))
            self._thread.submit(self._hand_over, copied, piece, buffer)

    def close(self) -> None:
        """Hand over what is under way, then stop."""
        self._thread.shutdown(wait=True)

    def _hand_over(self, copied: CopyEvent, piece: StagedPiece, buffer: torch.Tensor) -> None:
        try:
            copied.wait()
            self._sink(piece)
        except Exception:  # the boundary of a thread: the lease fails, its reader is told
            logger.exception("kv staging failed: lease=%s", piece.order.lease_id)
            self._on_failure(piece.order)
        finally:
            self._ring.give(buffer)
