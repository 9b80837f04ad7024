"""KV in device memory is looked up by the holder's own GPU, whichever the reader has."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest

from specprefill.core.types import Lease, Ticket
from specprefill.kv import rpc
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import SealedFrame
from specprefill.kv.keeper import Piece
from specprefill.kv.keeper_link import KeeperLink
from specprefill.kv.leases import LeaseStore
from specprefill.kv.nixl.agent import NixlMemory
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.nixl.device_reads import DeviceClient, DeviceIntroduction, DeviceReadHandler
from specprefill.kv.nixl.landing import LandingMemory

FINGERPRINT = "layout"
LEASE, SECRET = "lease", "secret"
TICKET = Ticket(Lease(LEASE, SECRET), (), FINGERPRINT, 0)
TOKENS, TOKEN_BYTES, FRAME_TOKENS = 10, 16, 4
ADDRESS, LANDING_ADDRESS = 1 << 40, 1 << 41


class Read:
    """A read that has ended."""

    def __init__(self, payload):
        self.payload = payload

    def has_ended(self):
        return True


class Agent:
    """Reads nothing, and records what it was to read."""

    name = "agent"

    def __init__(self):
        self.met, self.remote, self.local = [], [], []

    def metadata(self):
        return b"metadata"

    def progress(self):
        pass

    def add_peer(self, _endpoint, name, metadata, _call):
        self.met.append((name, metadata))

    def forget_on_error(self, _endpoint):
        return nullcontext()

    def read_memory(self, _peer, remote, local, into):
        self.remote.append(remote)
        self.local.append(local)
        return Read(into)


@pytest.fixture(params=[3, 0, None])
def holder(request):
    """A holder's worker, whose KV is in the memory of one GPU, or of the host."""
    link = KeeperLink(
        max_bytes=1 << 20,
        carrier="nixl",
        host="127.0.0.1",
        tls=None,
        lease_s=30.0,
        fingerprint=FINGERPRINT,
        device=(Agent(), NixlMemory(ADDRESS, 1 << 20, request.param)),
    )
    yield link, request.param
    link.close()


def test_frames_are_read_from_the_holders_gpu_into_the_readers(holder):
    link, index = holder
    piece = Piece(LEASE, 0, 0, TOKENS, 0, TOKEN_BYTES, FRAME_TOKENS, last=True)
    offset, _ = link.take(piece.size)
    assert offset == 0
    link.ask("open", LEASE, SECRET)
    link.append(piece, lambda: None)
    agent = Agent()
    landing = LandingMemory(Arena(1 << 20))
    client = DeviceClient(agent, landing, NixlMemory(LANDING_ADDRESS, 1 << 20, 1))
    frames = []
    client.pull(link.address, TICKET, FINGERPRINT, 0, 20.0).deliver_to(frames.append)
    client.close()
    assert [(frame.start, frame.stop) for frame in frames] == [(0, 4), (4, 8), (8, 10)]
    assert agent.met == [("agent", b"metadata")]
    assert [memory.device for memory in agent.remote] == [index] * 3
    assert [memory.device for memory in agent.local] == [1] * 3
    assert all(ADDRESS <= memory.address < ADDRESS + piece.size for memory in agent.remote)


def test_pulls_beyond_the_limit_wait_for_a_place(monkeypatch):
    monkeypatch.setattr(rpc, "_MOST_LENDINGS", 1)
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    shadow, introduction = Arena(1 << 20), DeviceIntroduction("agent", b"metadata", 3)
    handler = DeviceReadHandler(
        leases, FINGERPRINT, introduction, shadow, ADDRESS, lambda _readers: None
    )
    server = rpc.KvServer(
        leases, Announcements(), FINGERPRINT, "127.0.0.1", more_handlers=[handler]
    )
    address = server.start()
    leases.open(LEASE, SECRET)
    leases.append(LEASE, SealedFrame(0, 0, 4, shadow.take(4 * TOKEN_BYTES)), last=True)
    landing = LandingMemory(Arena(1 << 20))
    client = DeviceClient(Agent(), landing, NixlMemory(LANDING_ADDRESS, 1 << 20, 1))

    def pull(_number):
        frames = []
        client.pull(address, TICKET, FINGERPRINT, 0, 20.0).deliver_to(frames.append)
        return len(frames)

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(pull, range(6))) == [1] * 6
    client.close()
    server.stop()
