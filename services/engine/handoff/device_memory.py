"""Device memory beside an engine's caches that NIXL reads and writes: leases, landing places."""

from __future__ import annotations

from collections import deque

import torch

from ...core.errors import InvalidConfiguration
from ...kv.nixl.agent import NixlAgent, NixlMemory, agent_for
from ...kv.nixl.arena import Arena
from ...kv.nixl.device_reads import DeviceClient
from ...kv.nixl.landing import LandingMemory
from ...kv.nixl.reads import LANDING_BYTES
from ...kv.tls import TlsSource
from .device import CopyEvent, Device


def register_device_memory(memory: torch.Tensor) -> tuple[NixlAgent, NixlMemory]:
    """Start an agent of this process and register `memory`, `[n]` uint8, with it.

    Raises InvalidConfiguration where NIXL is missing, or KvTransferError where it refuses.
    """
    agent = agent_for("nixl", encrypted=False)
    if agent is None:
        raise InvalidConfiguration("kv.memory: device needs the carrier nixl")
    index = None if memory.device.type == "cpu" else memory.device.index
    place = NixlMemory(memory.data_ptr(), memory.nbytes, index)
    agent.register_memory(place)
    return agent, place


class Landing:
    """The landing memory of frames from other workers' devices, and the client that reads them."""

    def __init__(self, device: Device, tls: TlsSource | None) -> None:
        self._memory = device.device_buffer(LANDING_BYTES)
        self._shadow = Arena(LANDING_BYTES)
        self._storing: deque[tuple[CopyEvent, bytes | memoryview]] = deque()  # oldest first
        agent, place = register_device_memory(self._memory)
        room = LandingMemory(self._shadow, self._reclaim)
        self.client = DeviceClient(agent, room, place, tls)

    def hold_until(self, stored: CopyEvent, payload: bytes | memoryview) -> None:
        """Keep a frame in place until the device has read it; then its room may be used again."""
        self._storing.append((stored, payload))

    def _reclaim(self) -> bool:
        """Wait for the oldest frame of any pull that the device reads; False if there is none."""
        try:
            stored, _payload = self._storing.popleft()
        except IndexError:
            return False
        stored.wait()
        return True

    def landed_bytes(self, payload: memoryview) -> torch.Tensor:
        """Return the bytes, `[n]` uint8 on the device, whose shadow is `payload`."""
        offset = self._shadow.offset_of(payload)
        assert offset is not None
        return self._memory[offset : offset + len(payload)]
