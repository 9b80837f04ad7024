"""Copies KV from the cache to where it is served from, while later layers compute."""

from __future__ import annotations

from collections import deque

import torch

from ...core.types import Span
from ...kv.frames import FRAME_BYTES, HEADER_ROOM
from ...kv.keeper import Piece, piece_bytes
from ...kv.keeper_link import KeeperLink
from .caches import Caches
from .device import CopyEvent, Device
from .orders import Stage

_PIECE_BYTES = 8 << 20  # large enough for the bus, small enough to overlap


class Stager:
    """Gathers KV on the compute stream and copies it out on another.

    Copies under way hold at most `most_bytes` of the device's memory, or one piece: a step that
    stages more waits for the oldest of them.
    """

    def __init__(
        self,
        device: Device,
        caches: Caches,
        keeper: KeeperLink,
        most_bytes: int,
        memory: torch.Tensor,
    ) -> None:
        """`memory`, `[n]` uint8, is where the keeper's readers find the KV, by its offsets."""
        self._memory = memory
        self._stream = device.stream()
        self._caches = caches
        self._keeper = keeper
        self._most_bytes = most_bytes
        self._copying: deque[tuple[CopyEvent, int]] = deque()  # oldest first, with its bytes
        self._copying_bytes = 0
        self._frame_tokens = max(1, FRAME_BYTES // caches.token_bytes)
        frames = min(_PIECE_BYTES, most_bytes // 2) // FRAME_BYTES
        self._piece_tokens = max(1, frames) * self._frame_tokens

    def stage(self, order: Stage, layer: int, cache: torch.Tensor, *, last_layer: bool) -> None:
        """Copy the order's tokens of one layer. Called after the layer was launched.

        The cache may be overwritten by later launches at once: the gather runs before them, on
        the same stream. Where the shared memory is full, the lease ends, and the decode engine
        computes the prompt.
        """
        for start in range(order.start, order.stop, self._piece_tokens):
            stop = min(start + self._piece_tokens, order.stop)
            last = last_layer and stop == order.tokens
            if not self._copy(order, layer, cache, Span(start, stop), last=last):
                self._keeper.ask("drop", order.lease.id)
                return

    def _copy(
        self, order: Stage, layer: int, cache: torch.Tensor, tokens: Span, *, last: bool
    ) -> bool:
        """Copy the tokens; return False when there was no room."""
        token_bytes = self._caches.token_bytes
        size = piece_bytes(len(tokens), token_bytes, self._frame_tokens)
        room = self._keeper.take(size)
        if room is None:
            return False
        offset, _ = room  # the link keeps it taken
        self._wait_for(size)
        blocks = self._caches.block_tensor(order.lease.id, order.blocks)
        kv = self._caches.layout.read(cache, blocks, tokens.start, tokens.stop)
        source = _lay_out_frames(kv, self._frame_tokens * token_bytes, size)
        copied = self._stream.copy_out(source, self._memory[offset : offset + size])
        self._copying.append((copied, size))
        self._copying_bytes += size
        piece = Piece(
            order.lease.id,
            layer,
            tokens.start,
            tokens.stop,
            offset,
            token_bytes,
            self._frame_tokens,
            last,
        )
        self._keeper.append(piece, copied.wait)
        return True

    def _wait_for(self, size: int) -> None:
        """Wait until `size` bytes more may be under way."""
        while self._copying and self._copying_bytes + size > self._most_bytes:
            copied, its_size = self._copying.popleft()
            copied.wait()
            self._copying_bytes -= its_size


def _lay_out_frames(kv: torch.Tensor, frame_bytes: int, size: int) -> torch.Tensor:
    """Lay `kv`, contiguous, out as a piece's `size` bytes: header room before every frame."""
    raw = kv.view(torch.uint8).flatten()
    framed = torch.empty(size, dtype=torch.uint8, device=kv.device)
    whole, rest = divmod(len(raw), frame_bytes)
    stride = HEADER_ROOM + frame_bytes
    if whole:
        rows = framed[: whole * stride].view(whole, stride)
        rows[:, HEADER_ROOM:] = raw[: whole * frame_bytes].view(whole, frame_bytes)
    if rest:
        framed[size - rest :] = raw[whole * frame_bytes :]
    return framed
