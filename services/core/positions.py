"""Maps KV-cache slots to positions: the one mapping behind sparse prefill.

A pruned prompt has k tokens in slots 0..k-1 and kept its N original positions: slot i of
the prompt is at `kept[i]`, and the output token in slot k + j is at N + j (Speculative
Prefill, arXiv 2502.02789, section 3.2.4). Kept tokens come in runs, so the mapping is
stored and sent as runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from .types import Span

Positions = NDArray[np.int64]

WIRE_RUNS = "runs"
WIRE_PROMPT_TOKENS = "prompt_tokens"


@dataclass(frozen=True, slots=True)
class PositionMap:
    """The mapping from slots to positions of one request.

    `kept` is `[k]`, distinct, below `prompt_tokens` (N). It increases, except where a turn of a
    conversation fetched text that an earlier one had dropped: at its own positions, in later slots.
    """

    kept: Positions
    prompt_tokens: int

    def __post_init__(self) -> None:
        if self.kept.ndim != 1 or len(self.kept) == 0:
            raise ValueError("positions: at least one prompt token must be kept")
        if int(self.kept.min()) < 0 or int(self.kept.max()) >= self.prompt_tokens:
            raise ValueError(f"positions: must lie in [0, {self.prompt_tokens})")
        if len(np.unique(self.kept)) < len(self.kept):
            raise ValueError("positions: must be distinct")

    @property
    def slots(self) -> int:
        """The number of prompt tokens in the cache, k."""
        return len(self.kept)

    @property
    def shift(self) -> int:
        """The distance from an output token's slot to its position, N - k."""
        return self.prompt_tokens - self.slots

    @property
    def dense_slots(self) -> int:
        """The number of leading slots that are their own positions (all of them: no gap).

        With no prompt token dropped this is unbounded in effect: see `is_identity`.
        """
        same = self.kept == np.arange(self.slots)
        return self.slots if bool(same.all()) else int(np.argmin(same))

    @property
    def is_identity(self) -> bool:
        """True when nothing was dropped, so that slots are positions."""
        return self.shift == 0

    def positions(self, start: int, stop: int) -> Positions:
        """Return the positions of slots `[start, stop)`, as `[stop - start]` int64."""
        slots = np.arange(start, stop, dtype=np.int64)
        inside = self.kept[np.minimum(slots, self.slots - 1)]
        return np.where(slots < self.slots, inside, slots + self.shift)

    def to_wire(self) -> dict[str, Any]:
        """Return flat `[start, stop, start, stop, ...]` runs and N: small, and plain JSON types."""
        edges = np.flatnonzero(np.diff(self.kept) != 1) + 1
        starts = self.kept[np.concatenate(([0], edges))]
        stops = self.kept[np.concatenate((edges - 1, [self.slots - 1]))] + 1
        runs = np.stack((starts, stops), axis=1).ravel().tolist()
        return {WIRE_RUNS: runs, WIRE_PROMPT_TOKENS: self.prompt_tokens}

    @classmethod
    def from_wire(cls, wire: Mapping[str, Any]) -> PositionMap:
        """Parse the result of `to_wire`. Raises ValueError on anything malformed."""
        runs, prompt_tokens = wire.get(WIRE_RUNS), wire.get(WIRE_PROMPT_TOKENS)
        if not isinstance(prompt_tokens, int) or not is_flat_runs(runs):
            raise ValueError("positions: expected flat integer 'runs' and 'prompt_tokens'")
        pairs = zip(runs[::2], runs[1::2], strict=True)
        return cls.from_runs((Span(start, stop) for start, stop in pairs), prompt_tokens)

    @classmethod
    def from_runs(cls, runs: Iterable[Span], prompt_tokens: int) -> PositionMap:
        """Build the map from disjoint runs of original positions, in the order of their slots."""
        parts = [np.arange(run.start, run.stop, dtype=np.int64) for run in runs]
        kept = np.concatenate(parts) if parts else np.empty(0, dtype=np.int64)
        return cls(kept, prompt_tokens)


def is_flat_runs(runs: object) -> TypeGuard[Sequence[int]]:
    """Return True for a flat sequence of pairs of integers."""
    return (
        isinstance(runs, Sequence)
        and len(runs) >= 2
        and len(runs) % 2 == 0
        and all(isinstance(edge, int) for edge in runs)
    )
