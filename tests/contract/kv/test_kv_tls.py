"""KV under mutual TLS: only who shows the authority's certificate gets a byte."""

from __future__ import annotations

import time
from dataclasses import replace

import grpc
import pytest

from specprefill.core.errors import KvTransferError
from specprefill.core.types import Lease, Ticket
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import Frame, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.object_ref.stream import KvCollector, KvRelay
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import PULL, KvPeers, KvServer
from specprefill.kv.tls import MutualTls, read_tls
from tests.certificates import Authority

PAYLOAD = bytes(range(256))


@pytest.fixture(scope="module")
def tls(tmp_path_factory) -> MutualTls:
    return read_tls(Authority(tmp_path_factory.mktemp("ours")).files())


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> MutualTls:
    """Certificates of another authority, with the same names."""
    return read_tls(Authority(tmp_path_factory.mktemp("foreign")).files())


@pytest.fixture
def leases():
    store = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    store.open("lease", "secret")
    store.append("lease", seal(Frame(0, 0, 16, PAYLOAD), "lease"), last=True)
    return store


@pytest.fixture
def ticket(leases, tls):
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1", tls=tls)
    yield Ticket(Lease("lease", "secret"), (server.start(),), "layout", 16)
    server.stop()


def pull(endpoint: str, tls: MutualTls | None) -> bytes:
    """Pull the lease as a decode worker does."""
    client = KvClient(tls)
    try:
        asked = Ticket(Lease("lease", "secret"), (), "layout", 16)
        frames: list[Frame] = []
        client.pull(endpoint, asked, "layout", 0, 5.0).deliver_to(frames.append)
        return b"".join(bytes(frame.payload) for frame in frames)
    finally:
        client.close()


def refused(endpoint: str, tls: MutualTls | None) -> None:
    with pytest.raises(KvTransferError, match="UNAVAILABLE"):
        pull(endpoint, tls)


def test_a_peer_with_our_authoritys_certificate_pulls(ticket, tls, leases):
    assert pull(ticket.endpoints[0], tls) == PAYLOAD
    assert leases.gauges().pulled_total == 1


def test_a_plaintext_peer_is_refused(ticket, leases):
    refused(ticket.endpoints[0], None)
    assert leases.gauges().pulled_total == 0


def test_a_peer_of_another_authority_is_refused(ticket, tls, foreign, leases):
    """It trusts us, so that only our side can be what refuses."""
    refused(ticket.endpoints[0], replace(foreign, authority=tls.authority))
    assert leases.gauges().pulled_total == 0


def test_a_peer_without_a_certificate_is_refused(ticket, tls, leases):
    credentials = grpc.ssl_channel_credentials(tls.authority)
    options = [("grpc.ssl_target_name_override", tls.name)]
    with grpc.secure_channel(ticket.endpoints[0], credentials, options) as channel:
        stream = channel.unary_stream(PULL)(b"", timeout=5.0)
        with pytest.raises(grpc.RpcError) as caught:
            list(stream)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert leases.gauges().pulled_total == 0


def test_a_server_of_another_authority_is_refused(ticket, tls, foreign):
    refused(ticket.endpoints[0], replace(tls, authority=foreign.authority))


def test_a_server_of_another_name_is_refused(ticket, tls):
    refused(ticket.endpoints[0], replace(tls, name="somebody.else"))


async def test_releases_need_the_certificate(ticket, tls, leases):
    for who, released in ((None, 0), (tls, 1)):
        peers = KvPeers(who)
        await peers.release(ticket)
        await peers.close()
        assert leases.gauges().released_total == released


def test_objects_are_collected_and_offered_under_tls(ticket, tls):
    stranger, known = KvCollector(), KvCollector(tls)
    with (
        pytest.raises(KvTransferError, match="UNAVAILABLE"),
        stranger.collect(ticket, 0, 5.0),
    ):
        pass
    with known.collect(ticket, 0, 5.0) as kv:
        pass  # it came through the socket: the arrays are our own
    relay = KvRelay("127.0.0.1", tls)
    relay.start()
    try:
        relay.offer(ticket, kv)
        refused(relay.address, None)
        assert pull(relay.address, tls) == PAYLOAD
    finally:
        relay.stop()
