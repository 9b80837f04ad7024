"""A fixed number of host buffers, used again and again: the bound of what is under way."""

from __future__ import annotations

import threading
from collections import deque

import torch

from .device import CopyEvent, Device


class BufferRing:
    """`slots` buffers of `slot_bytes` each, allocated when the ring is made. Thread-safe."""

    def __init__(self, device: Device, slot_bytes: int, slots: int) -> None:
        self.slot_bytes = slot_bytes
        self.size = slot_bytes * slots
        memory = device.host_buffer(self.size)
        self._free = deque(memory.split(slot_bytes))
        self._copying: deque[tuple[CopyEvent, torch.Tensor]] = deque()  # oldest first
        self._changed = threading.Condition()

    def take(self) -> torch.Tensor:
        """Return a buffer, `[slot_bytes]` uint8; wait for the oldest one in use if there is none.

        Whoever takes a buffer gives it back, by one of the two ways.
        """
        with self._changed:
            while not self._free and not self._copying:
                self._changed.wait()
            if self._free:
                return self._free.popleft()
            event, buffer = self._copying.popleft()
        event.wait()
        return buffer

    def give(self, buffer: torch.Tensor) -> None:
        """Give a buffer back that nothing uses any more."""
        with self._changed:
            self._free.append(buffer)
            self._changed.notify()

    def give_after(self, event: CopyEvent, buffer: torch.Tensor) -> None:
        """Give a buffer back whose copy is done at `event`."""
        with self._changed:
            self._copying.append((event, buffer))
            self._changed.notify()


def ring_of(device: Device, most_bytes: int, slot_bytes: int) -> BufferRing:
    """Return a ring of at most `most_bytes`, but two buffers at least: one fills, one empties."""
    return BufferRing(device, slot_bytes, max(2, most_bytes // slot_bytes))
