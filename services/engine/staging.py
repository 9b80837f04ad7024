"""Copies of KV on their way from the cache to a lease."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch

from .handoff import Stage

Copied = tuple[Stage, int, memoryview]  # order, layer, raw bytes


class Stager(Protocol):
    """Takes copies during a step, gives their bytes at its end."""

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """Keep `kv`, a contiguous copy `[n, 2, heads, dim]`, of one layer."""
        ...

    def drain(self) -> Iterator[Copied]:
        """Everything taken in this step, in order, as host bytes."""
        ...


class HostStager:
    """The cache is in host memory: the copy is what is handed over."""

    def __init__(self) -> None:
        self._taken: list[tuple[Stage, int, torch.Tensor]] = []

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """See Stager."""
        self._taken.append((order, layer, kv))

    def drain(self) -> Iterator[Copied]:
        """See Stager."""
        taken, self._taken = self._taken, []
        for order, layer, kv in taken:
            yield order, layer, _raw(kv)


class DeviceStager:
    """The cache is on a GPU: copies go to pinned memory on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._host = HostStager()

    def take(self, order: Stage, layer: int, kv: torch.Tensor) -> None:
        """See Stager. The gather ran on the compute stream; only the copy moves off it."""
        pinned = torch.empty(kv.shape, dtype=kv.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            pinned.copy_(kv, non_blocking=True)
        kv.record_stream(self._stream)
        self._host.take(order, layer, pinned)

    def drain(self) -> Iterator[Copied]:
        """See Stager."""
        self._stream.synchronize()
        return self._host.drain()


def stager_for(device: torch.device) -> Stager:
    """The stager for caches on `device`."""
    return HostStager() if device.type == "cpu" else DeviceStager(device)


def _raw(kv: torch.Tensor) -> memoryview:
    return memoryview(kv.view(torch.uint8).flatten().numpy())
