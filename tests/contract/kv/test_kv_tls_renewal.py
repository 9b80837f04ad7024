"""KV under mutual TLS while its certificates are replaced: old streams go on, new ones follow."""

from __future__ import annotations

import threading
import time

import pytest

from specprefill.core.errors import KvTransferError
from specprefill.core.types import Lease, Ticket
from specprefill.kv.announcements import Announcements
from specprefill.kv.frames import Frame, seal
from specprefill.kv.leases import LeaseStore
from specprefill.kv.pull import KvClient
from specprefill.kv.rpc import KvPeers, KvServer
from specprefill.kv.tls import RELOAD_S, read_tls, watch_tls
from tests.certificates import Authority

PAYLOAD = bytes(range(256))


@pytest.fixture
def leases():
    store = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
    store.open("lease", "secret")
    store.append("lease", seal(Frame(0, 0, 16, PAYLOAD), "lease"), last=True)
    return store


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "pki"


@pytest.fixture
def files(folder):
    return Authority(folder).files()


@pytest.fixture
def endpoint(leases, files):
    server = KvServer(leases, Announcements(), "layout", "127.0.0.1", tls=watch_tls(files))
    yield server.start()
    server.stop()


def pull(client, endpoint):
    frames: list[Frame] = []
    asked = Ticket(Lease("lease", "secret"), (), "layout", 16)
    client.pull(endpoint, asked, "layout", 0, 5.0).deliver_to(frames.append)
    return b"".join(bytes(frame.payload) for frame in frames)


@pytest.fixture
def clients():
    """Clients that a test opens, closed with it."""
    opened: list[KvClient] = []

    def client(tls):
        opened.append(KvClient(tls))
        return opened[-1]

    yield client
    for each in opened:
        each.close()


def replace_authority(folder):
    """Another authority signs from now on; every file changes. Returns the new files' content."""
    return read_tls(Authority(folder).files())


def wait_for_a_look():
    time.sleep(RELOAD_S)  # files are looked at by the clock


def test_server_and_client_follow_a_new_authority_without_a_restart(
    folder, files, endpoint, clients
):
    old = read_tls(files)
    living = clients(watch_tls(files))
    assert pull(living, endpoint) == PAYLOAD
    new = replace_authority(folder)
    wait_for_a_look()
    assert pull(living, endpoint) == PAYLOAD  # by a connection with the new certificate
    assert pull(clients(new), endpoint) == PAYLOAD
    with pytest.raises(KvTransferError, match="UNAVAILABLE"):
        pull(clients(old), endpoint)


def test_a_stream_under_way_survives_the_change(folder, files, endpoint, leases, clients):
    client = clients(watch_tls(files))
    leases.open("slow", "secret")
    asked = Ticket(Lease("slow", "secret"), (), "layout", 16)
    frames: list[Frame] = []
    pulled = client.pull(endpoint, asked, "layout", 0, 20.0)
    deliver = threading.Thread(target=pulled.deliver_to, args=(frames.append,))
    deliver.start()
    replace_authority(folder)
    wait_for_a_look()
    assert pull(client, endpoint) == PAYLOAD  # beside it, with the new certificate
    leases.append("slow", seal(Frame(0, 0, 16, PAYLOAD), "slow"), last=True)
    deliver.join(timeout=20)
    assert b"".join(bytes(frame.payload) for frame in frames) == PAYLOAD


async def test_releases_follow_a_new_authority(folder, files, endpoint, leases):
    peers = KvPeers(watch_tls(files))
    ticket = Ticket(Lease("lease", "secret"), (endpoint,), "layout", 16)
    assert await peers.renew(ticket)
    replace_authority(folder)
    wait_for_a_look()
    await peers.release(ticket)
    await peers.close()
    assert leases.gauges().released_total == 1
