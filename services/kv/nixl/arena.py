"""Memory set aside once, for bytes that a carrier moves without this process's help.

A network card (or another process) reads and writes only memory that was registered with it,
and registering is slow: so it is done once, for all of an arena.
"""

from __future__ import annotations

import bisect
import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

_ALIGNMENT = 64  # a cache line

Bytes = NDArray[np.uint8]


class Arena:
    """Room for views of bytes. A place is free again once nothing refers to its view.

    So nothing has to be given back by hand: bytes stay in place for as long as a lease, a
    reader or a transfer holds them, or a part of them. Thread-safe.
    """

    def __init__(self, size: int, memory: Bytes | None = None) -> None:
        """`memory`: of `size` bytes, to use instead of the arena's own."""
        # Pages that nobody has touched cost nothing.
        self._memory: Bytes = np.empty(size, dtype=np.uint8) if memory is None else memory
        self._address = address_of(self._memory)
        self._free = [(0, size)]  # (start, stop): sorted, disjoint, not adjacent
        self._left: deque[tuple[int, int]] = deque()  # by finalizers: any thread, at any moment
        self._on_free: list[Callable[[], object]] = []
        self._lock = threading.Lock()

    def on_free(self, call: Callable[[], object]) -> None:
        """Call `call` whenever a place is free again: from finalizers, so it must not lock."""
        self._on_free.append(call)

    @property
    def memory(self) -> Bytes:
        """The whole arena, to register it."""
        return self._memory

    @property
    def bytes_used(self) -> int:
        """Bytes that are taken, alignment included."""
        with self._lock:
            self._merge_free()
            return self._memory.nbytes - sum(stop - start for start, stop in self._free)

    def take(self, size: int) -> memoryview | None:
        """Return `size` uninitialised bytes; None if there is no room in one piece."""
        span = max(_ALIGNMENT, -(-size // _ALIGNMENT) * _ALIGNMENT)
        with self._lock:
            self._merge_free()
            for place, (start, stop) in enumerate(self._free):
                if stop - start >= span:
                    self._take_front(place, start + span)
                    return self._view(start, start + span)[:size]
        return None

    def hold(self, parts: Sequence[bytes | memoryview]) -> memoryview | None:
        """Copy `parts`, one behind the other; None if there is no room in one piece."""
        view = self.take(sum(len(part) for part in parts))
        if view is None:
            return None
        start = 0
        for part in parts:
            view[start : start + len(part)] = part
            start += len(part)
        return view

    def holds(self, payload: memoryview | bytes) -> bool:
        """Return True if `payload` lies in the arena."""
        return self.offset_of(payload) is not None

    def offset_of(self, payload: memoryview | bytes) -> int | None:
        """Return the offset of `payload` in the arena; None if it lies elsewhere."""
        offset = address_of(payload) - self._address
        return offset if 0 <= offset < self._memory.nbytes else None

    def _take_front(self, place: int, start: int) -> None:
        """Take the front of a free place."""
        stop = self._free[place][1]
        self._free[place : place + 1] = [(start, stop)] if start < stop else []

    def _view(self, start: int, stop: int) -> memoryview:
        """Return a view that its own views keep alive; an array of an array would not be."""
        array = self._memory[start:stop]
        weakref.finalize(array, self._leave, (start, stop)).atexit = False
        return array.data

    def _leave(self, span: tuple[int, int]) -> None:
        self._left.append(span)
        for call in self._on_free:
            call()

    def _merge_free(self) -> None:
        """Join what was left with the free places beside it."""
        while self._left:
            start, stop = self._left.popleft()
            place = bisect.bisect(self._free, (start, stop))
            if place < len(self._free) and self._free[place][0] == stop:
                stop = self._free.pop(place)[1]
            if place > 0 and self._free[place - 1][1] == start:
                place -= 1
                start = self._free.pop(place)[0]
            self._free.insert(place, (start, stop))


def address_of(payload: memoryview | bytes | Bytes) -> int:
    """Return the address of the bytes in this process's memory."""
    if isinstance(payload, memoryview) and not payload.readonly:
        return ctypes.addressof(
            ctypes.c_char.from_buffer(payload)
        )  # an array takes as long to make
    address: int = np.frombuffer(payload, dtype=np.uint8).__array_interface__["data"][0]
    return address
