"""Rope positions of a mixed batch, some of whose requests are sparse (V1 model runner)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..positions import PositionMap
from .params import positions_of


@dataclass(frozen=True, slots=True)
class _Sparse:
    kept: torch.Tensor  # [k] int64
    shift: int

    @classmethod
    def of(cls, mapping: PositionMap, device: torch.device) -> _Sparse:
        return cls(torch.from_numpy(mapping.kept).to(device), mapping.shift)

    def rewrite(self, slots: torch.Tensor) -> None:
        """Turn `slots`, `[n]` integers, into positions, in place."""
        k = len(self.kept)
        inside = self.kept[slots.clamp(max=k - 1)]
        slots.copy_(torch.where(slots < k, inside, slots + self.shift))


class SparseBatch:
    """The sparse requests an engine's worker knows, by request id."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
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
        """Rewrite `positions`, `[tokens]`, in place, for the batch in its order.

        In place, because captured CUDA graphs read this very buffer; vLLM fills it anew
        every step, and cache slots were computed from it before.
        """
        offset = 0
        for request_id in request_ids:
            tokens = scheduled[request_id]
            sparse = self._lookup(request_id, requests)
            if sparse is not None:
                sparse.rewrite(positions[offset : offset + tokens])
            offset += tokens

    def _lookup(self, request_id: str, requests: Mapping[str, Any]) -> _Sparse | None:
        if request_id not in self._known:
            mapping = positions_of(requests[request_id].sampling_params)
            sparse = mapping is not None and not mapping.is_identity
            self._known[request_id] = _Sparse.of(mapping, self._device) if sparse else None
        return self._known[request_id]
