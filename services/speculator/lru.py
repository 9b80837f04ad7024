"""Values under a byte budget; what was used least recently goes first. Pure."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteLru(Generic[V]):
    """A map that forgets. It belongs to one thread."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[bytes, tuple[V, int]] = OrderedDict()
        self.bytes_held = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def get(self, key: bytes) -> V | None:
        """Return the value, now the most recently used; None: never put, or forgotten."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: V, size: int) -> None:
        """Hold `value` of `size` bytes; a value beyond the whole budget is not held."""
        if size > self._max_bytes:
            return
        _, replaced = self._entries.pop(key, (None, 0))
        self.bytes_held += size - replaced
        self._entries[key] = (value, size)
        self.shrink(self._max_bytes)

    def shrink(self, max_bytes: int) -> None:
        """Forget until no more than `max_bytes` are held."""
        while self._entries and self.bytes_held > max_bytes:
            _, (_, size) = self._entries.popitem(last=False)
            self.bytes_held -= size
