"""Copies between an engine's caches and host memory, beside the stream that computes.

The order that a GPU needs, and a CPU does not, is part of the interface, so that both devices run
the same code: a copy out starts after what the calling thread has launched; a write starts after
the event that its stream waits for; nothing may touch a host buffer before the event of its copy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

from ...core.errors import InvalidConfiguration


class CopyEvent(Protocol):
    """A point in the work of a stream."""

    def wait(self) -> None:
        """Block this thread until the work before it is done."""
        ...


class CopyStream(Protocol):
    """A queue of copies, done in order, beside the model's computation. Any thread may use it."""

    def order_after(self, event: CopyEvent) -> None:
        """Do what is queued from now on after `event`."""
        ...

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> CopyEvent:
        """Queue a copy of `source`, on the device, into the host buffer `into`, of equal shape.

        It starts after all that the calling thread has launched so far. `source` may be
        forgotten at once; `into` holds the copy after the event.
        """
        ...

    def write(self, source: torch.Tensor, store: Callable[[torch.Tensor], None]) -> CopyEvent:
        """Queue a copy of the host buffer `source` to the device, and `store` of that copy.

        `store` launches work on the device. `source` may be used again after the event.
        """
        ...

    def run(self, work: Callable[[], None]) -> CopyEvent:
        """Queue `work`, which launches on the device. The event is behind it."""
        ...

    def wait(self) -> None:
        """Block this thread until everything queued is done."""
        ...


class Device(Protocol):
    """The device of an engine's caches."""

    shares_cores: bool  # an engine that polls takes time from those that compute

    def stream(self) -> CopyStream:
        """Make a stream."""
        ...

    def mark_computed(self) -> CopyEvent:
        """Mark what the calling thread, the engine's, has launched so far."""
        ...

    def host_buffer(self, size: int) -> torch.Tensor:
        """Allocate `[size]` uint8 in host memory that the device copies from and to by itself."""
        ...

    def device_buffer(self, size: int) -> torch.Tensor:
        """Allocate `[size]` uint8 on the device."""
        ...

    def page_lock(self, memory: torch.Tensor) -> None:
        """Let the device copy to and from `memory`, `[n]` uint8 of this process, by itself."""
        ...

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """Copy `values` to the device, on the calling thread's stream, without waiting."""
        ...


class _Done:
    def wait(self) -> None:
        """Return at once: the work was done when the event was made."""


class HostDevice:
    """Caches in host memory: every copy is done when its call returns. Its own stream."""

    shares_cores = True

    def stream(self) -> CopyStream:
        """See Device."""
        return self

    def mark_computed(self) -> CopyEvent:
        """See Device."""
        return _Done()

    def host_buffer(self, size: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8)

    def device_buffer(self, size: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8)

    def page_lock(self, memory: torch.Tensor) -> None:
        """See Device."""

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """See Device."""
        return values

    def order_after(self, event: CopyEvent) -> None:
        """See CopyStream."""

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> CopyEvent:
        """See CopyStream."""
        into.copy_(source)
        return _Done()

    def write(self, source: torch.Tensor, store: Callable[[torch.Tensor], None]) -> CopyEvent:
        """See CopyStream."""
        store(source)
        return _Done()

    def run(self, work: Callable[[], None]) -> CopyEvent:
        """See CopyStream."""
        work()
        return _Done()

    def wait(self) -> None:
        """See CopyStream."""


class CudaDevice:
    """Caches on a GPU."""

    shares_cores = False

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def stream(self) -> CopyStream:
        """See Device."""
        return _CudaStream(self._device)

    def mark_computed(self) -> CopyEvent:
        """See Device."""
        return _CudaEvent.record(torch.cuda.current_stream(self._device))

    def host_buffer(self, size: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)

    def device_buffer(self, size: int) -> torch.Tensor:
        """See Device."""
        return torch.empty(size, dtype=torch.uint8, device=self._device)

    def page_lock(self, memory: torch.Tensor) -> None:
        """See Device. Raises InvalidConfiguration where the node has no room for it."""
        status = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(status) != 0:
            raise InvalidConfiguration(
                f"kv.max_held_bytes: {memory.nbytes} bytes cannot be page-locked on this node "
                f"(CUDA error {int(status)})"
            )

    def upload(self, values: torch.Tensor) -> torch.Tensor:
        """See Device."""
        return values.pin_memory().to(self._device, non_blocking=True)


class _CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    @classmethod
    def record(cls, stream: torch.cuda.Stream) -> _CudaEvent:
        event = torch.cuda.Event(blocking=True)  # threads that wait for it leave the core
        event.record(stream)
        return cls(event)

    def wait(self) -> None:
        self.event.synchronize()


class _CudaStream:
    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._device = device

    def order_after(self, event: CopyEvent) -> None:
        if isinstance(event, _CudaEvent):
            self._stream.wait_event(event.event)

    def copy_out(self, source: torch.Tensor, into: torch.Tensor) -> CopyEvent:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            into.copy_(source, non_blocking=True)
        source.record_stream(self._stream)  # its memory is not used again before the copy
        return _CudaEvent.record(self._stream)

    def write(self, source: torch.Tensor, store: Callable[[torch.Tensor], None]) -> CopyEvent:
        with torch.cuda.stream(self._stream):
            there = source.to(self._device, non_blocking=True)
            copied = _CudaEvent.record(self._stream)
            store(there)
        return copied

    def run(self, work: Callable[[], None]) -> CopyEvent:
        with torch.cuda.stream(self._stream):
            work()
        return _CudaEvent.record(self._stream)

    def wait(self) -> None:
        self._stream.synchronize()


def device_of(cache: torch.Tensor) -> Device:
    """Return the device of an engine's caches, read from one layer's cache."""
    return HostDevice() if cache.device.type == "cpu" else CudaDevice(cache.device)
