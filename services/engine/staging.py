"""Copies of KV on their way from the cache to a lease."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from .handoff import Stage

Sink = Callable[[Stage, int, memoryview], None]  # order, layer, raw bytes


class Stager(Protocol):
    """Takes copies during a step and gives their bytes to its sink, layer by layer."""

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """Hand over `kv`, a contiguous copy `[n, 2, heads, dim]`, of one layer."""
        ...

    def flush(self) -> None:
        """Return when the cache may be overwritten: everything taken has been copied."""
        ...


class HostStager:
    """The cache is in host memory: the copy is what is handed over, at once."""

    def __init__(self, sink: Sink) -> None:
        self._sink = sink

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """See Stager."""
        self._sink(order, layer, _raw(kv))

    def flush(self) -> None:
        """See Stager."""


class DeviceStager:
    """The cache is on a GPU: copies go to pinned memory on a stream of their own.

    A layer's bytes go to the sink, on a thread of its own, when a later layer finds its copy
    done, or at the flush.
    """

    def __init__(self, device: torch.device, sink: Sink) -> None:
        self._stream = torch.cuda.Stream(device)
        self._sink = sink
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="kv-seal")  # keeps the order
        self._copying: deque[tuple[torch.cuda.Event, Stage, int, torch.Tensor]] = deque()

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """See Stager. The gather ran on the compute stream; only the copy moves off it."""
        pinned = torch.empty(kv.shape, dtype=kv.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            pinned.copy_(kv, non_blocking=True)
            done = torch.cuda.Event()
            done.record()
        kv.record_stream(self._stream)
        self._copying.append((done, order, layer, pinned))
        while self._copying[0][0].query():
            self._hand_over()
            if not self._copying:
                return

    def flush(self) -> None:
        """See Stager."""
        self._stream.synchronize()
        while self._copying:
            self._hand_over()

    def _hand_over(self) -> None:
        _, order, layer, pinned = self._copying.popleft()
        self._thread.submit(self._sink, order, layer, _raw(pinned))


def stager_for(device: torch.device, sink: Sink) -> Stager:
    """The stager for caches on `device`."""
    return HostStager(sink) if device.type == "cpu" else DeviceStager(device, sink)


def _raw(kv: torch.Tensor) -> memoryview:
    return memoryview(kv.view(torch.uint8).flatten().numpy())
