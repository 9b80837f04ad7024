"""KV as an object: what a prefill worker sends is what a decode worker gets, whoever carries it."""

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from specprefill.core.errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from specprefill.core.types import Lease, Ticket
from specprefill.kv import rpc
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import Frame, decode, from_token, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.object_ref.shared_memory import LocateHandler, Mappings, SharedMemory
from specprefill.kv.object_ref.stream import KvCollector, KvRelay, as_object, messages
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvServer

TOKENS, TOKEN_BYTES = 96, 16
PAYLOAD_BYTES = TOKENS * TOKEN_BYTES
PAYLOAD = bytes(range(256)) * (PAYLOAD_BYTES // 256)


@pytest.fixture
def one_at_a_time(monkeypatch):
    monkeypatch.setitem(rpc._MOST_AT_ONCE, rpc.PULL, 1)
    monkeypatch.setattr(rpc, "_MOST_LENDINGS", 1)


@pytest.fixture(params=["lent", "crowded", "sent"])
def ticket(request):
    """A ticket for two layers in two chunks, held by a prefill worker's store.

    Its messages are in shared memory, all but what found no room there, or in the worker's own.
    """
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    room = {"lent": 1 << 20, "crowded": PAYLOAD_BYTES, "sent": 1}[request.param]
    locate = LocateHandler(leases, "layout", SharedMemory(room))
    handlers = [] if request.param == "sent" else [locate]
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1", more_handlers=handlers)
    leases.open("lease", "secret")
    for start, stop in ((0, 64), (64, TOKENS)):
        for layer in (0, 1):
            piece = PAYLOAD[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            last = (layer, stop) == (1, TOKENS)
            frame = Frame(layer, start, stop, piece)
            leases.append("lease", seal(frame, "lease", locate.arena), last=last)
    yield Ticket(Lease("lease", "secret"), (server.start(),), "layout", TOKENS)
    server.stop()


@pytest.fixture
def collect():
    """Take one rank's KV, and copy it as Ray's object store does."""
    collector = KvCollector()

    def copied(ticket):
        with collector.collect(ticket, 0, 5.0) as kv:
            return [array.copy() for array in kv]

    yield copied
    collector.close()


@pytest.fixture
def relay():
    relay = KvRelay("127.0.0.1")
    relay.start()
    yield relay
    relay.stop()


@pytest.fixture(params=[1, 2, 4], ids=lambda streams: f"{streams}_streams")
def client(request):
    client = KvClient(streams=request.param)
    yield client
    client.close()


def pull(client, relay, *, lease="lease", secret="secret", fingerprint="layout"):
    ticket = Ticket(Lease(lease, secret), (), fingerprint, TOKENS)
    frames = []
    client.pull(relay.address, ticket, fingerprint, 0, 5.0).deliver_to(frames.append)
    return sorted(frames, key=lambda frame: frame.layer)


def test_the_object_holds_the_whole_stream(ticket, collect, relay, client):
    relay.offer(ticket, collect(ticket))
    for _ in range(3):  # one pull per sample; the object stays until it is withdrawn
        frames = pull(client, relay)
        assert [(f.layer, f.start, f.stop) for f in frames] == [
            (0, 0, 64), (0, 64, 96), (1, 0, 64), (1, 64, 96)
        ]  # fmt: skip
        assert b"".join(bytes(f.payload) for f in frames if f.layer == 1) == PAYLOAD


def test_collecting_leaves_the_lease_to_its_holder(ticket, collect):
    once, again = (list(messages(collect(ticket))) for _ in range(2))
    assert once[:-1] == again[:-1]  # the trailer tells the time


def test_collectors_beyond_the_limit_wait_for_a_place(one_at_a_time, ticket, collect):
    with ThreadPoolExecutor(6) as threads:
        objects = list(threads.map(lambda _: list(messages(collect(ticket))), range(6)))
    assert all(each[:-1] == objects[0][:-1] for each in objects)


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"lease": Lease("other", "secret")}, LeaseNotFound),
        ({"lease": Lease("lease", "wrong")}, LeaseNotFound),
        ({"fingerprint": "another layout"}, LayoutMismatch),
    ],
)
def test_collecting_without_the_right_is_refused(ticket, collect, changed, error):
    with pytest.raises(error):
        collect(replace(ticket, **changed))


def test_lent_memory_is_free_again_when_lease_and_reader_are_gone():
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    locate = LocateHandler(leases, "layout", SharedMemory(1 << 20))
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1", more_handlers=[locate])
    leases.open("lease", "secret")
    leases.append("lease", seal(Frame(0, 0, TOKENS, PAYLOAD), "lease", locate.arena), last=True)
    collector = KvCollector()
    ticket = Ticket(Lease("lease", "secret"), (server.start(),), "layout", TOKENS)
    with collector.collect(ticket, 0, 5.0) as kv:
        leases.release("lease", "secret")
        assert decode(next(messages(kv)), "lease").payload == PAYLOAD
        assert locate.arena.bytes_used > 0
    collector.close()
    server.stop()  # its threads have let go when it returns
    assert locate.arena.bytes_used == 0


def test_memory_of_another_process_is_known_by_its_inode():
    shared = SharedMemory(4096)
    shared.memory[:3] = 1, 2, 3
    assert list(Mappings().view("peer", shared.region)[:4]) == [1, 2, 3, 0]
    for other in ({"inode": shared.region.inode + 1}, {"boot_id": "another"}, {"pid": 1 << 30}):
        assert Mappings().view("peer", replace(shared.region, **other)) is None


def test_the_puller_skips_what_it_has(ticket, collect, relay, client):
    relay.offer(ticket, collect(ticket))
    parts = [from_token(frame, 70) for frame in pull(client, relay)]
    assert [(p.layer, p.start, p.stop) for p in parts if p] == [(0, 70, 96), (1, 70, 96)]


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        ({"lease": "other"}, LeaseNotFound),
        ({"secret": "wrong"}, LeaseNotFound),
        ({"fingerprint": "another layout"}, LayoutMismatch),
    ],
)
def test_a_pull_without_the_right_is_refused(ticket, collect, relay, client, fields, error):
    relay.offer(ticket, collect(ticket))
    with pytest.raises(error):
        pull(client, relay, **fields)


def test_a_withdrawn_object_is_gone(ticket, collect, relay, client):
    relay.offer(ticket, collect(ticket))
    relay.withdraw(ticket)
    relay.withdraw(ticket)
    with pytest.raises(LeaseNotFound):
        pull(client, relay)


@pytest.mark.parametrize("place", [5, 500, -1])
@pytest.mark.parametrize("message", [0, 2, -1])
def test_a_byte_that_flips_on_the_way_is_found(ticket, collect, relay, client, message, place):
    came = [bytearray(each) for each in messages(collect(ticket))]
    came[message][place % len(came[message])] ^= 1
    relay.offer(ticket, as_object(came))
    with pytest.raises((CorruptFrame, KvTransferError)):
        pull(client, relay)


@pytest.mark.parametrize("index", [b"", b"\xff", b"\x91\x93\x07\x00\x01", b"\x91\x07"])
def test_an_index_that_points_nowhere_is_found(ticket, collect, relay, client, index):
    relay.offer(ticket, [np.frombuffer(index, dtype=np.uint8), *collect(ticket)[1:]])
    with pytest.raises(KvTransferError):
        pull(client, relay)


@pytest.mark.parametrize("lacks", ["five bytes", "the trailer", "a frame"])
def test_an_object_that_is_cut_short_is_found(ticket, collect, relay, client, lacks):
    *frames, trailer = messages(collect(ticket))
    cut = {
        "five bytes": [*frames[:-1], frames[-1][:-5], trailer],
        "the trailer": frames,
        "a frame": [frames[0], *frames[2:], trailer],
    }[lacks]
    relay.offer(ticket, as_object(cut))
    with pytest.raises(KvTransferError):
        pull(client, relay)
