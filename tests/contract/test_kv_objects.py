"""KV as an object: what a prefill worker sends is what a decode worker gets, whoever carries it."""

import time

import numpy as np
import pytest

from specprefill.errors import CorruptFrame, KvTransferError, LayoutMismatch, LeaseNotFound
from specprefill.kv.frames import Frame
from specprefill.kv.leases import LeaseStore
from specprefill.kv.objects import KvRelay, collect
from specprefill.kv.rpc import KvClient, KvServer, from_token
from specprefill.types import Ticket

TOKENS, TOKEN_BYTES = 96, 16
PAYLOAD = bytes(range(256)) * (TOKENS * TOKEN_BYTES // 256)


@pytest.fixture
def ticket():
    """A ticket for two layers in two chunks, held by a prefill worker's store."""
    leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    server = KvServer(leases, "layout", "127.0.0.1")
    leases.open("lease", "secret", tokens=TOKENS, uses=1)
    for start, stop in ((0, 64), (64, TOKENS)):
        for layer in (0, 1):
            piece = PAYLOAD[start * TOKEN_BYTES : stop * TOKEN_BYTES]
            last = (layer, stop) == (1, TOKENS)
            leases.append("lease", Frame(layer, start, stop, piece), last=last)
    yield Ticket("lease", "secret", (server.start(),), "layout", TOKENS)
    server.stop()


@pytest.fixture
def relay():
    relay = KvRelay()
    relay.start()
    yield relay
    relay.stop()


@pytest.fixture
def client():
    client = KvClient()
    yield client
    client.close()


def pull(client, relay, *, lease="lease", secret="secret", fingerprint="layout"):
    ticket = {"lease_id": lease, "secret": secret}
    return list(client.pull(relay.address, ticket, fingerprint, 0, 5.0))


def test_the_object_holds_the_whole_stream(ticket, relay, client):
    relay.offer(ticket, collect(ticket, 0, 5.0))
    for _ in range(3):  # one pull per sample; the object stays until it is withdrawn
        frames = pull(client, relay)
        assert [(f.layer, f.start, f.stop) for f in frames] == [
            (0, 0, 64), (1, 0, 64), (0, 64, 96), (1, 64, 96)
        ]  # fmt: skip
        assert b"".join(bytes(f.payload) for f in frames if f.layer == 1) == PAYLOAD


def test_collecting_uses_the_lease_up(ticket):
    collect(ticket, 0, 5.0)
    with pytest.raises(LeaseNotFound, match="pulled"):
        collect(ticket, 0, 5.0)


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


@pytest.mark.parametrize("place", [10, 500, 1500, -1])
def test_a_byte_that_flips_on_the_way_is_found(ticket, relay, client, place):
    kv = collect(ticket, 0, 5.0).copy()
    kv[place] ^= 1
    relay.offer(ticket, kv)
    with pytest.raises((CorruptFrame, KvTransferError)):
        pull(client, relay)


def test_an_object_that_is_cut_short_is_found(ticket, relay, client):
    kv = collect(ticket, 0, 5.0)
    relay.offer(ticket, np.array(kv[:-5]))
    with pytest.raises(KvTransferError):
        pull(client, relay)
