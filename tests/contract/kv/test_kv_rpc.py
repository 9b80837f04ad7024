"""The KV stream over real gRPC: whole, authenticated, and never taken for what it is not."""

from __future__ import annotations

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import grpc
import msgpack
import pytest

from specprefill.core.errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from specprefill.core.types import Lease, Ticket
from specprefill.kv import rpc
from specprefill.kv.announcements import Announcement, Announcements
from specprefill.kv.frames import Frame, Trailer, encode, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.object_ref.shared_memory import LOCATE, LocateHandler, SharedMemory
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import DRAIN, PULL, RELEASE, RENEW, WATCH, KvPeers, KvServer

TICKET = Ticket(Lease("lease", "secret"), (), "layout", 0)
LAYERS, TOKENS, TOKEN_BYTES = 3, 64, 16


@pytest.fixture
def leases():
    return LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)


@pytest.fixture
def announcements():
    return Announcements()


@pytest.fixture
def address(leases, announcements):
    server = KvServer(leases, announcements, "layout", "127.0.0.1")
    yield server.start()
    server.stop()


@pytest.fixture(params=[1, 2, 4], ids=lambda streams: f"{streams}_streams")
def client(request):
    client = KvClient(streams=request.param)
    yield client
    client.close()


def payload(layer: int, start: int, stop: int) -> bytes:
    return b"".join(bytes([layer, token]) * (TOKEN_BYTES // 2) for token in range(start, stop))


def stage(leases, start: int, stop: int, *, layers: int = LAYERS) -> None:
    leases.open("lease", "secret")
    for layer in range(layers):
        last = stop == TOKENS and layer == LAYERS - 1
        frame = Frame(layer, start, stop, payload(layer, start, stop))
        leases.append("lease", seal(frame, "lease"), last=last)


def pull(client, address, *, fingerprint="layout", ticket=TICKET, start=0, timeout_s=5.0):
    return client.pull(address, ticket, fingerprint, start, timeout_s)


def frames_of(pull) -> list[Frame]:
    """Everything that came, by layer: a layer comes in token order, layers in any."""
    frames: list[Frame] = []
    pull.deliver_to(frames.append)
    return sorted(frames, key=lambda frame: frame.layer)


def test_every_layer_arrives_in_token_order(leases, address, client):
    stage(leases, 0, 40)
    stage(leases, 40, TOKENS)
    frames = frames_of(pull(client, address))
    assert [(f.layer, f.start, f.stop) for f in frames] == [
        (layer, start, stop) for layer in range(LAYERS) for start, stop in ((0, 40), (40, 64))
    ]
    assert all(bytes(f.payload) == payload(f.layer, f.start, f.stop) for f in frames)


def test_a_pull_starts_where_the_other_side_lacks_tokens(leases, address, client):
    stage(leases, 0, 40)
    stage(leases, 40, TOKENS)
    frames = frames_of(pull(client, address, start=50))
    assert [(f.start, f.stop) for f in frames] == [(50, 64)] * LAYERS
    assert all(bytes(f.payload) == payload(f.layer, 50, 64) for f in frames)


def test_frames_stream_while_later_ones_are_computed(leases, address, client):
    stage(leases, 0, 40)
    running, came = pull(client, address), []

    def store(frame: Frame) -> None:
        came.append(frame)
        if len(came) == LAYERS:  # everything that there is so far
            stage(leases, 40, TOKENS)

    running.deliver_to(store)
    assert len(came) == 2 * LAYERS


def test_a_pull_lasts_as_long_as_frames_come(leases, address, client):
    """Also where a prompt takes longer to compute than a silence may last."""
    stage(leases, 0, 16)
    running = pull(client, address, timeout_s=3.0)

    def compute() -> None:
        for start in range(16, TOKENS, 16):
            time.sleep(1.1)  # three times
            stage(leases, start, start + 16)

    computing = threading.Thread(target=compute)
    computing.start()
    assert [frame.start for frame in frames_of(running)] == [0, 16, 32, 48] * LAYERS
    computing.join()


def test_a_pull_of_kv_that_does_not_go_on_fails(leases, address, client):
    stage(leases, 0, 40)
    with pytest.raises(KvTransferError):
        frames_of(pull(client, address, timeout_s=0.2))


class Mute(grpc.GenericRpcHandler):
    """A peer that takes calls and says nothing."""

    def __init__(self) -> None:
        self.closing = threading.Event()

    def service(self, details):
        def wait(_message, _context):
            self.closing.wait()
            yield from ()

        return grpc.unary_stream_rpc_method_handler(wait)


def test_a_peer_that_falls_silent_ends_the_pull(client):
    mute, server = Mute(), grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers([mute])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(KvTransferError, match=r"nothing came for 0\.2 s"):
            frames_of(pull(client, f"127.0.0.1:{port}", timeout_s=0.2))
    finally:
        mute.closing.set()
        server.stop(grace=0).wait()


def test_a_slow_receiver_is_no_silence(leases, address, client):
    stage(leases, 0, 40)
    stage(leases, 40, TOKENS)
    busy_s = iter([2.5])  # with the first frame
    running = pull(client, address, timeout_s=2.0)
    running.deliver_to(lambda _frame: time.sleep(next(busy_s, 0.0)))


def test_a_pull_returns_how_long_the_kv_waited(leases, address, client):
    stage(leases, 0, TOKENS)
    time.sleep(0.05)
    assert 0.05 <= pull(client, address).deliver_to(lambda _frame: None) < 5.0


def test_what_the_receiver_raises_ends_the_pull(leases, address, client):
    stage(leases, 0, 40)  # never complete: the other streams would wait

    def refuse(_frame: Frame) -> None:
        raise CorruptFrame("not this one")

    with pytest.raises(KvTransferError):
        pull(client, address).deliver_to(refuse)


@pytest.mark.parametrize(
    ("ticket", "fingerprint", "error"),
    [
        (replace(TICKET, lease=Lease("other", "secret")), "layout", LeaseNotFound),
        (replace(TICKET, lease=Lease("lease", "wrong")), "layout", LeaseNotFound),
        (TICKET, "another layout", LayoutMismatch),
    ],
)
def test_a_pull_without_the_right_is_refused(leases, address, client, ticket, fingerprint, error):
    stage(leases, 0, TOKENS)
    with pytest.raises(error):
        frames_of(pull(client, address, ticket=ticket, fingerprint=fingerprint))
    assert leases.gauges().leases == 1


def test_pulling_from_a_peer_that_is_gone_fails_at_once(client):
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match="UNAVAILABLE"):
        frames_of(pull(client, "127.0.0.1:9", timeout_s=60.0))
    assert time.monotonic() - started_s < 20.0


def test_a_lease_released_under_its_reader_ends_the_pull(leases, address, client):
    stage(leases, 0, 40)
    with pytest.raises(LeaseNotFound, match="released"):
        pull(client, address).deliver_to(lambda _frame: leases.release("lease", "secret"))


def test_a_cancelled_pull_leaves_the_lease(leases, address, client):
    stage(leases, 0, 40)
    running = pull(client, address)
    threading.Timer(0.05, running.cancel).start()
    with pytest.raises(KvTransferError, match="CANCELLED"):
        frames_of(running)
    assert leases.gauges().leases == 1


async def test_renewing_from_asyncio_returns_whether_the_lease_is_there(leases, address):
    stage(leases, 0, TOKENS)
    ticket = Ticket(Lease("lease", "secret"), (address,), "layout", TOKENS)
    peers = KvPeers()
    assert await peers.renew(ticket)
    await peers.release(ticket)
    assert not await peers.renew(ticket)
    await peers.close()


async def test_release_from_asyncio_is_idempotent(leases, address):
    stage(leases, 0, TOKENS)
    ticket = Ticket(Lease("lease", "secret"), (address,), "layout", TOKENS)
    releaser = KvPeers()
    await releaser.release(ticket)
    await releaser.release(ticket)
    await releaser.close()
    assert leases.gauges().released_total == 1


async def test_what_may_be_pulled_is_announced(announcements, address):
    peers, announced = KvPeers(), Announcement("lease", TOKENS, "layout")
    heard = asyncio.ensure_future(anext(peers.announcements(address)))
    while not heard.done():  # whoever is not yet listening gets nothing
        announcements.announce(announced)
        await asyncio.wait([heard], timeout=0.01)
    assert heard.result() == announced
    await peers.close()


async def test_a_dead_peer_announces_nothing():
    peers = KvPeers()
    assert [announced async for announced in peers.announcements("127.0.0.1:9")] == []
    await peers.close()


async def test_releasing_at_a_dead_peer_is_no_error():
    releaser = KvPeers()
    await releaser.release(Ticket(Lease("lease", "secret"), ("127.0.0.1:9",), "layout", TOKENS))
    await releaser.close()


class _Liar(grpc.GenericRpcHandler):
    """A peer that streams whatever it was given."""

    def __init__(self, messages: list[bytes]) -> None:
        self._messages = messages

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        assert details.method == PULL
        return grpc.unary_stream_rpc_method_handler(lambda _request, _context: iter(self._messages))


@pytest.fixture
def alone():
    """A client with one stream: the liar streams the same to each."""
    client = KvClient()
    yield client
    client.close()


FRAMES = [Frame(layer, 0, TOKENS, payload(layer, 0, TOKENS)) for layer in range(LAYERS)]
GOOD = [encode(item, "lease") for item in (*FRAMES, Trailer(LAYERS))]


@pytest.mark.parametrize(
    "messages",
    [
        GOOD[:-1],
        GOOD[:1] + GOOD[2:],
        [*GOOD[:2], GOOD[1], *GOOD[2:]],
        [encode(FRAMES[0], "another lease"), *GOOD[1:]],
        [GOOD[0][:-1], *GOOD[1:]],
        [],
    ],
    ids=["no_trailer", "frame_lost", "frame_twice", "foreign_frame", "truncated", "nothing"],
)
def test_a_stream_that_is_not_whole_is_refused(alone, messages):
    from concurrent import futures

    server = grpc.server(futures.ThreadPoolExecutor(1), handlers=[_Liar(messages)])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(CorruptFrame):
            frames_of(pull(alone, f"127.0.0.1:{port}"))
    finally:
        server.stop(grace=0).wait()


@pytest.mark.parametrize("method", [PULL, RENEW, RELEASE, DRAIN])
@pytest.mark.parametrize(
    "message",
    [b"", b"\xc1", msgpack.packb(7), msgpack.packb({"lease_id": 1}), b"\x91" * 5000],
    ids=["empty", "not_msgpack", "not_a_map", "wrong_fields", "deep"],
)
def test_a_malformed_message_is_the_callers_mistake(address, method, message):
    with grpc.insecure_channel(address) as channel:
        call = channel.unary_stream if method == PULL else channel.unary_unary
        with pytest.raises(grpc.RpcError) as refused:
            list(call(method)(message, timeout=5))
    assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_calls_that_wait_leave_room_for_those_that_do_not(leases, address):
    """Without a secret, 64 drains once held every thread of the port."""
    leases.open("lease", "secret")
    drain = msgpack.packb({"timeout_s": 1e9})
    renew = msgpack.packb({"lease_id": "lease", "secret": "secret"})
    with grpc.insecure_channel(address) as channel:
        waiting = [channel.unary_unary(DRAIN).future(drain, timeout=120) for _ in range(100)]
        waiting += [channel.unary_stream(WATCH)(b"", timeout=120) for _ in range(100)]
        waiting += [channel.unary_stream(PULL)(pull_message(), timeout=120) for _ in range(200)]
        assert msgpack.unpackb(channel.unary_unary(RENEW)(renew, timeout=30)) is True
        refused = [call for call in waiting if call.done()]
        assert {call.code() for call in refused} <= {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in waiting:
            call.cancel()


def test_lent_memory_leaves_room_for_calls_that_do_not_wait(leases, announcements):
    """A reader holds a thread of the port for as long as it reads."""
    leases.open("lease", "secret")
    locate = LocateHandler(leases, "layout", SharedMemory(1 << 20))
    server = KvServer(leases, announcements, "layout", "127.0.0.1", more_handlers=[locate])
    renew = msgpack.packb({"lease_id": "lease", "secret": "secret"})
    with grpc.insecure_channel(server.start()) as channel:
        reading = [channel.unary_stream(LOCATE)(pull_message(), timeout=120) for _ in range(400)]
        assert msgpack.unpackb(channel.unary_unary(RENEW)(renew, timeout=20)) is True
        refused = [call for call in reading if call.done()]
        assert {call.code() for call in refused} == {grpc.StatusCode.RESOURCE_EXHAUSTED}
        for call in reading:
            call.cancel()
    server.stop()


@pytest.fixture
def full(leases, monkeypatch):
    """The address of a port that serves one pull at a time, and one such pull."""
    monkeypatch.setitem(rpc._MOST_AT_ONCE, PULL, 1)
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1")
    address = server.start()
    stage(leases, 0, 40)
    with grpc.insecure_channel(address) as channel:
        first = channel.unary_stream(PULL)(pull_message())
        next(first)
        yield address, first
    server.stop()


def test_a_pull_beyond_the_limit_waits_for_a_place(full, leases, alone):
    address, first = full
    threading.Timer(0.3, first.cancel).start()
    threading.Timer(0.4, stage, (leases, 40, TOKENS)).start()  # until then `first` has its place
    assert len(frames_of(pull(alone, address, timeout_s=20.0))) == 2 * LAYERS


def test_a_pull_does_not_wait_longer_for_a_place_than_for_a_message(full, alone):
    address, _first = full
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match=r"RESOURCE_EXHAUSTED|nothing came"):
        frames_of(pull(alone, address, timeout_s=0.3))
    assert time.monotonic() - started_s < 10.0


@pytest.mark.parametrize("end", ["cancel", "close"])
def test_a_pull_that_waits_for_a_place_can_be_ended(full, alone, end):
    address, _first = full
    waiting = pull(alone, address, timeout_s=60.0)
    threading.Timer(0.3, waiting.cancel if end == "cancel" else alone.close).start()
    started_s = time.monotonic()
    with pytest.raises(KvTransferError):
        frames_of(waiting)
    assert time.monotonic() - started_s < 20.0


def test_a_drain_ends_with_its_caller(leases, address):
    leases.open("lease", "secret")
    drain = msgpack.packb({"timeout_s": 1e9})
    with grpc.insecure_channel(address) as channel:
        for _ in range(40):  # several times as many as may wait at once
            with pytest.raises(grpc.RpcError) as ended:
                channel.unary_unary(DRAIN)(drain, timeout=0.3)
            if ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED:
                pytest.fail("drains whose callers have hung up still hold their places")


def pull_message():
    query = {"lease_id": "lease", "secret": "secret", "fingerprint": "layout", "start": 0}
    return msgpack.packb({**query, "timeout_s": 60.0, "part": 0, "parts": 1})
