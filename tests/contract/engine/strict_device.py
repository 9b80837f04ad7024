"""A device whose copies happen as late as a GPU's may, so that a missing order is a wrong byte.

Nothing that was queued on a stream is done before somebody waits for it. A host buffer that a copy
will fill holds poison until then; one that a copy reads is read when the copy is done, not when
it was queued. So reading too early, or using a buffer again too early, yields other bytes.
"""

from __future__ import annotations

import threading
from collections import deque

import torch

POISON = 0xA5


class StrictEvent:
    """The work of a stream up to a place in its queue."""

    def __init__(self, stream, place):
        self.stream, self.place = stream, place

    def wait(self):
        self.stream.run_to(self.place)


class StrictStream:
    """Runs its queue only as far as it must."""

    def __init__(self, device):
        self.device = device
        self.lock = threading.RLock()
        self.queue = deque()
        self.queued = self.ran = 0

    def launch(self, work):
        with self.lock:
            self.queue.append(work)
            self.queued += 1
            return StrictEvent(self, self.queued)

    def run_to(self, place):
        with self.lock:
            while self.ran < place:
                self.ran += 1
                self.queue.popleft()()

    def order_after(self, event):
        self.launch(event.wait)

    def copy_out(self, source, into):
        into.fill_(POISON)
        self.order_after(self.device.mark_computed())
        self.device.add(source.nbytes)

        def copy():
            into.copy_(source)
            self.device.add(-source.nbytes)

        return self.launch(copy)

    def write(self, source, store):
        return self.launch(lambda: store(source.clone()))

    def run(self, work):
        return self.launch(work)

    def wait(self):
        self.run_to(self.queued)


class StrictDevice:
    """Its compute stream is a queue, too: `launch` puts the model's work there."""

    shares_cores = False

    def __init__(self):
        self.compute = StrictStream(self)
        self.outstanding = self.peak = 0  # bytes on the device that wait for a copy out
        self._lock = threading.Lock()

    def launch(self, work):
        return self.compute.launch(work)

    def add(self, size):
        with self._lock:
            self.outstanding += size
            self.peak = max(self.peak, self.outstanding)

    def stream(self):
        return StrictStream(self)

    def mark_computed(self):
        return StrictEvent(self.compute, self.compute.queued)

    def host_buffer(self, size):
        return torch.full((size,), POISON, dtype=torch.uint8)

    def device_buffer(self, size):
        return torch.full((size,), POISON, dtype=torch.uint8)

    def page_lock(self, memory):
        pass

    def upload(self, values):
        return values


class UnorderedStream(StrictStream):
    """Reports its work done when it is merely queued."""

    def wait(self):
        pass


class UnorderedDevice(StrictDevice):
    """A device on which a hand-over without events shows its faults."""

    def stream(self):
        return UnorderedStream(self)

    def mark_computed(self):
        return StrictEvent(self.compute, 0)


class BrokenStream(StrictStream):
    """Its copies out fail."""

    def copy_out(self, source, into):
        def fail():
            raise self.device.error("unforeseen")

        return self.launch(fail)


class BrokenDevice(StrictDevice):
    """No copy from it arrives."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def stream(self):
        return BrokenStream(self)
