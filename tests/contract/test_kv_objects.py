"""KV as an object: what a prefill worker sends is what a decode worker gets, whoever carries it."""

import time
from dataclasses import replace

import pytest

from specprefill.errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import Frame, from_token, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.objects import KvRelay, collect
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvServer
from specprefill.types import Ticket

TOKENS, TOKEN_BYTES = 96, 16
PAYLOAD = bytes(range(256)) * (TOKENS * TOKEN_BYTES // 256)


@pytest.fixture
def ticket():
    """A ticket for two layers in two chunks, held by a prefill worker's store."""
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1")
    leases.open("lease", "secret")
    for start, stop in ((0, 64), (64, TOKENS)):
        for layer in (0, 1):
            piece = PAYLOAD[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            last = (layer, stop) == (1, TOKENS)
            frame = Frame(layer, start, stop, piece)
            leases.append("lease", seal(frame, "lease"), last=last)
    yield Ticket("lease", "secret", (server.start(),), "layout", TOKENS)
    server.stop()


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
    ticket = {"lease_id": lease, "secret": secret}
    frames = []
    client.pull(relay.address, ticket, fingerprint, 0, 5.0).into(frames.append)
    return sorted(frames, key=lambda frame: frame.layer)


def test_the_object_holds_the_whole_stream(ticket, relay, client):
    relay.offer(ticket, collect(ticket, 0, 5.0))
    for _ in range(3):  # one pull per sample; the object stays until it is withdrawn
        frames = pull(client, relay)
        assert [(f.layer, f.start, f.stop) for f in frames] == [
            (0, 0, 64), (0, 64, 96), (1, 0, 64), (1, 64, 96)
        ]  # fmt: skip
        assert b"".join(bytes(f.payload) for f in frames if f.layer == 1) == PAYLOAD


def test_collecting_leaves_the_lease_to_its_holder(ticket):
    once, again = collect(ticket, 0, 5.0), collect(ticket, 0, 5.0)
    assert [bytes(message) for message in once[:-1]] == [bytes(m) for m in again[:-1]]


def test_a_lease_that_is_gone_cannot_be_collected(ticket):
    with pytest.raises(LeaseNotFound):
        collect(replace(ticket, lease_id="other"), 0, 5.0)


def test_the_puller_skips_what_it_has(ticket, relay, client):
    relay.offer(ticket, collect(ticket, 0, 5.0))
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
def test_who_may_not_pull_is_told(ticket, relay, client, fields, error):
    relay.offer(ticket, collect(ticket, 0, 5.0))
    with pytest.raises(error):
        pull(client, relay, **fields)


def test_a_withdrawn_object_is_gone(ticket, relay, client):
    relay.offer(ticket, collect(ticket, 0, 5.0))
    relay.withdraw(ticket)
    relay.withdraw(ticket)
    with pytest.raises(LeaseNotFound):
        pull(client, relay)


@pytest.mark.parametrize("place", [5, 500, -1])
@pytest.mark.parametrize("message", [0, 2, -1])
def test_a_byte_that_flips_on_the_way_is_found(ticket, relay, client, message, place):
    kv = collect(ticket, 0, 5.0)
    kv[message] = kv[message].copy()
    kv[message][place % len(kv[message])] ^= 1
    relay.offer(ticket, kv)
    with pytest.raises((CorruptFrame, KvTransferError)):
        pull(client, relay)


@pytest.mark.parametrize("lacks", ["five bytes", "the trailer", "a frame"])
def test_an_object_that_is_cut_short_is_found(ticket, relay, client, lacks):
    *frames, trailer = collect(ticket, 0, 5.0)
    cut = {
        "five bytes": [*frames[:-1], frames[-1][:-5], trailer],
        "the trailer": frames,
        "a frame": [frames[0], *frames[2:], trailer],
    }[lacks]
    relay.offer(ticket, cut)
    with pytest.raises(KvTransferError):
        pull(client, relay)
