"""Copies KV from the cache to where it is served from, while later layers compute."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ...core.types import Span
from ...kv.frames import FRAME_BYTES, HEADER_ROOM
from ...kv.keeper import Piece
from ...kv.keeper_link import KeeperLink
from .caches import Caches
from .device import CopyEvent, Device
from .orders import Stage
from .states import ROW_BYTES

_PIECE_BYTES = 8 << 20  # large enough for the bus, small enough to overlap


@dataclass(frozen=True, slots=True)
class _Rows:
    """Equal rows of one layer, which travel in order: its tokens, or the rows of its state."""

    layer: int
    span: Span
    row_bytes: int
    read: Callable[[int, int], torch.Tensor]  # of [start, stop): contiguous, on the device


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
        self._piece_frames = max(1, min(_PIECE_BYTES, most_bytes // 2) // FRAME_BYTES)

    def stage(self, order: Stage, layer: int, *, last_layer: bool) -> None:
        """Copy the order's tokens of one layer. Called after the layer was launched.

        The cache may be overwritten by later launches at once: the gather runs before them, on
        the same stream. Where the shared memory has no room for one frame, the lease ends, and the
        decode engine computes the prompt.
        """
        layout, cache = self._caches.layout, self._caches.by_layer[layer]
        blocks = self._caches.block_tensor(order.lease.id, layer, order.blocks)

        def read(start: int, stop: int) -> torch.Tensor:
            return layout.read(cache, blocks, start, stop)

        rows = _Rows(layer, Span(order.start, order.stop), self._caches.token_bytes, read)
        self._stage(order, rows, last=last_layer and order.is_last)

    def stage_state(self, order: Stage, layer: int, *, last_layer: bool) -> None:
        """Copy a recurrent layer's state after the order's last token, likewise."""
        state, block = self._caches.states[layer], self._caches.state_block(layer, order.blocks)
        if block is None:
            self._keeper.ask("drop", order.lease.id)
            return

        def read(start: int, stop: int) -> torch.Tensor:
            return state.read(block, start - order.tokens, stop - order.tokens)

        span = Span(order.tokens, order.tokens + state.rows)
        self._stage(order, _Rows(layer, span, ROW_BYTES, read), last=last_layer)

    def _stage(self, order: Stage, rows: _Rows, *, last: bool) -> None:
        start = rows.span.start
        while start < rows.span.stop:
            piece = self._place_piece(order.lease.id, rows, start, last=last)
            if piece is None:
                self._keeper.ask("drop", order.lease.id)
                return
            self._copy(piece, rows)
            start = piece.stop

    def _place_piece(self, lease_id: str, rows: _Rows, start: int, *, last: bool) -> Piece | None:
        """Take room for the rows from `start` on; return None if not even one frame has any.

        The memory may be free in places that hold less than the largest piece.
        """
        frame_rows = max(1, FRAME_BYTES // rows.row_bytes)
        frames = min(self._piece_frames, -(-(rows.span.stop - start) // frame_rows))
        while frames > 0:
            stop = min(start + frames * frame_rows, rows.span.stop)
            ends = last and stop == rows.span.stop
            piece = Piece(lease_id, rows.layer, start, stop, 0, rows.row_bytes, frame_rows, ends)
            room = self._keeper.take(piece.size)
            if room is not None:
                return replace(piece, offset=room[0])  # the link keeps it taken
            frames //= 2
        return None

    def _copy(self, piece: Piece, rows: _Rows) -> None:
        """Copy the piece's rows to its place."""
        self._wait_for(piece.size)
        source = _lay_out_frames(
            rows.read(piece.start, piece.stop), piece.frame_tokens * piece.token_bytes, piece.size
        )
        place = self._memory[piece.offset : piece.offset + piece.size]
        copied = self._stream.copy_out(source, place)
        self._copying.append((copied, piece.size))
        self._copying_bytes += piece.size
        self._keeper.append(piece, copied.wait)

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
