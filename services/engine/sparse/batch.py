"""Positions of a mixed batch, some of whose requests are sparse, for both model runners.

Multimodal rope has a row of positions per dimension. In a prompt of text alone, which is all
that may be sparse, every row holds the same numbers: the cache slots, before they are rewritten.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ...core.positions import PositionMap
from ..params import positions_of


@dataclass(frozen=True, slots=True)
class _Sparse:
    kept: torch.Tensor  # [k] int64
    shift: int

    @classmethod
    def from_mapping(cls, mapping: PositionMap, device: torch.device) -> _Sparse:
        return cls(torch.from_numpy(mapping.kept).to(device), mapping.shift)

    def rewrite(self, slots: torch.Tensor, last: int) -> None:
        """Turn `slots`, `[n]` or `[rows, n]` integers, into positions up to `last`, in place."""
        k = len(self.kept)
        inside = self.kept[slots.clamp(max=k - 1)]
        slots.copy_(torch.where(slots < k, inside, (slots + self.shift).clamp(max=last)))


class SparseBatch:
    """The sparse requests an engine's worker knows, by request id.

    No position exceeds `last`. Proposed tokens can lie beyond it where their request must end:
    vLLM counts slots there. Such a token is never used.
    """

    def __init__(self, device: torch.device, last: int) -> None:
        self._device = device
        self._last = last
        self._known: dict[str, _Sparse | None] = {}

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop finished requests."""
        for request_id in request_ids:
            self._known.pop(request_id, None)

    def rewrite(
        self,
        positions: torch.Tensor,
        request_ids: Iterable[str],
        scheduled: Mapping[str, int],
        requests: Mapping[str, Any],
    ) -> None:
        """Rewrite `positions`, `[tokens]` or `[rows, tokens]`, in place, in the batch's order.

        In place, because captured CUDA graphs read this very buffer; vLLM fills it anew
        every step, and cache slots were computed from it before. `requests` holds all that are not
        finished: a step without tokens, which does not come here, may have ended others.
        """
        if len(self._known) > len(requests):
            self.forget(self._known.keys() - requests.keys())
        offset = 0
        for request_id in request_ids:
            tokens = scheduled[request_id]
            sparse = self._lookup(request_id, requests)
            if sparse is not None:
                sparse.rewrite(positions[..., offset : offset + tokens], self._last)
            offset += tokens

    def _lookup(self, request_id: str, requests: Mapping[str, Any]) -> _Sparse | None:
        if request_id not in self._known:
            mapping = positions_of(requests[request_id].sampling_params)
            self._known[request_id] = (
                None
                if mapping is None or mapping.is_identity
                else _Sparse.from_mapping(mapping, self._device)
            )
        return self._known[request_id]


class SparseSlots:
    """The sparse requests of the V2 model runner, by its persistent request slot.

    Output tokens, the bulk of a running batch, are shifted by one vectorised addition;
    only requests still in their prompt are looked at one by one. No position exceeds `last`, as
    in `SparseBatch`.
    """

    def __init__(self, max_requests: int, device: torch.device, last: int) -> None:
        self._device = device
        self._last = last
        self._shift = torch.zeros(max_requests, dtype=torch.int64, device=device)
        self._sparse: dict[int, _Sparse] = {}

    def occupy(self, slot: int, mapping: PositionMap | None) -> None:
        """Assign `slot` to a request; whatever was there before is forgotten."""
        self._sparse.pop(slot, None)
        self._shift[slot] = 0 if mapping is None else mapping.shift
        if mapping is not None and not mapping.is_identity:
            self._sparse[slot] = _Sparse.from_mapping(mapping, self._device)

    def rewrite(
        self,
        positions: torch.Tensor,
        slots: torch.Tensor,
        starts: torch.Tensor,
        rows: Iterable[tuple[int, int, int, int]],
    ) -> None:
        """Rewrite `positions`, `[tokens]` or `[rows, tokens]`, in place, from cache slots.

        `slots` is `[requests]`, the batch's request slots; `starts` is `[requests + 1]`,
        where each request's tokens begin; `rows` holds the same on the host, as (slot,
        start, stop, tokens computed before).
        """
        sparse_rows = [row for row in rows if row[0] in self._sparse]
        if not sparse_rows:
            return
        in_prompt = [
            (self._sparse[slot], positions[..., start:stop], positions[..., start:stop].clone())
            for slot, start, stop, computed in sparse_rows
            if computed < len(self._sparse[slot].kept)
        ]
        shift = self._shift[slots]
        positions += torch.repeat_interleave(shift, starts.diff(), output_size=positions.shape[-1])
        positions.clamp_(max=self._last)
        for sparse, view, original in in_prompt:
            sparse.rewrite(original, self._last)
            view.copy_(original)
