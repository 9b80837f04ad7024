"""The order of waiting requests: priority, then those that can meet the SLO, then fair shares."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

Item = TypeVar("Item")
KEYS_KEPT = 4096  # remembered ends of keys, beside those that still matter


@dataclass(slots=True)
class FairQueue(Generic[Item]):
    """Self-clocked fair queueing by work: every key gets the same share of the servers.

    A request's tag is where its key's earlier work ends, or the tag now in service if that is
    later, plus its own seconds. So a short request passes the long ones of others, a key that
    sends much waits behind those that send little, and nobody waits forever.
    """

    _heap: list[tuple[int, bool, float, int, Item]] = field(default_factory=list)
    _ends: dict[Hashable, float] = field(default_factory=dict)
    _virtual_s: float = 0.0
    _pushed: int = 0

    def __len__(self) -> int:
        return len(self._heap)

    def push(
        self, item: Item, work_s: float, *, key: Hashable = None, priority: int = 0, late: bool
    ) -> None:
        """Add `item`, which takes `work_s`. Lower `priority` goes first, as in vLLM.

        Requests without a key do not share one: each stands for itself.
        """
        started_s = self._virtual_s
        if key is not None:
            started_s = max(started_s, self._ends.get(key, 0.0))
            self._ends[key] = started_s + work_s
            if len(self._ends) > KEYS_KEPT + 2 * len(self._heap):
                self._ends = {k: end for k, end in self._ends.items() if end > self._virtual_s}
        self._pushed += 1
        heappush(self._heap, (priority, late, started_s + work_s, self._pushed, item))

    def pop(self) -> Item:
        """Take the next item. Raises IndexError when nothing waits."""
        _, _, tag_s, _, item = heappop(self._heap)
        self._virtual_s = max(self._virtual_s, tag_s)
        if not self._heap:  # everybody is even again
            self._ends.clear()
            self._virtual_s = 0.0
        return item

    def sweep(self, stays: Callable[[Item], bool]) -> None:
        """Drop the items that `stays` rejects: they left while they waited."""
        self._heap = [entry for entry in self._heap if stays(entry[-1])]
        heapify(self._heap)
