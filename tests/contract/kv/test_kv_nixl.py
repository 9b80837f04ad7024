"""Peculiarities of the carrier `nixl`: memory that is read while its owner may die."""

from __future__ import annotations

import gc
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from nixl._api import nixl_agent

from specprefill.core.errors import CorruptFrame, InvalidConfiguration, KvTransferError
from specprefill.core.types import Lease, Ticket
from specprefill.kv.frames import Trailer, encode
from specprefill.kv.nixl.agent import NixlAgent, agent_for, require
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.nixl.reads import LANDING_BYTES, NixlClient
from tests.contract.kv.carriers import CHUNKS, LAYERS, LEASE, Nixl, reader, taken
from tests.contract.kv.nixl_worker import FINGERPRINT, FRAMES, SECRET, Worker, payload

TRANSPORTS = {"shared_memory": None, "tcp": "tcp"}
BEGUN = ((0, 20), (20, 40))  # more frames than are read ahead
TICKET = Ticket(Lease(LEASE, SECRET), (), "", 0)


@pytest.fixture(scope="module", params=TRANSPORTS)
def worker(request) -> Iterator[Worker]:
    worker = Worker(TRANSPORTS[request.param])
    yield worker
    worker.close()


@pytest.fixture
def landing() -> Arena:
    return Arena(LANDING_BYTES)


@pytest.fixture
def client(landing) -> Iterator[NixlClient]:
    client = NixlClient(reader(), landing)
    client.start()
    yield client
    client.close()


@pytest.fixture
def other() -> Iterator[Nixl]:
    """Another prefill worker, which lives on."""
    other = Nixl()
    other.start()
    yield other
    other.stop()


def test_a_worker_that_hangs_costs_the_pull_its_time(worker, client):
    worker.stop()
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match="nothing came for"):
        client.pull(worker.address, TICKET, FINGERPRINT, 0, 0.5).deliver_to(lambda _frame: None)
    worker.go_on()
    assert 0.4 < time.monotonic() - started_s < 15.0


def test_it_is_read_whole_then_dies_under_its_next_reader(worker, client, landing, other):
    frames = []
    client.pull(worker.address, TICKET, FINGERPRINT, 0, 20.0).deliver_to(
        lambda frame: frames.append((frame.layer, bytes(frame.payload)))
    )
    assert frames == [(layer, payload(layer)) for layer in range(FRAMES)]

    started_s = time.monotonic()
    assert frames_until_death(worker, client) < FRAMES
    assert time.monotonic() - started_s < 15.0

    other.stage(*CHUNKS)  # the reader's agent has come to no harm
    assert len(other.pull()) == LAYERS * len(CHUNKS)
    gc.collect()  # the error that was raised refers to the frame that was being read
    assert landing.bytes_used == 0


@pytest.fixture
def workers() -> Iterator[list[Nixl]]:
    """Three prefill workers; the first has not computed all of its prompt."""
    started = [Nixl() for _ in range(3)]
    for worker in started:
        worker.start()
        worker.stage(*(BEGUN if worker is started[0] else CHUNKS))
    yield started
    for worker in started:
        worker.stop()


def test_of_peers_beyond_the_bound_those_that_no_pull_reads_from_are_forgotten(
    workers, landing, monkeypatch
):
    remove, forgotten = nixl_agent.remove_remote_agent, []

    def remove_seen(library, name):
        forgotten.append(name)
        remove(library, name)

    monkeypatch.setattr(nixl_agent, "remove_remote_agent", remove_seen)
    first, second, third = workers
    agent = NixlAgent("reader-of-few", most_peers=1)
    agent.start()
    client = NixlClient(agent, landing)
    client.start()

    def pull(worker, on_frames=lambda _frames: None) -> int:
        frames = []

        def store(frame):
            frames.append(frame)
            on_frames(len(frames))

        client.pull(worker.address, TICKET, FINGERPRINT, 0, 20.0).deliver_to(store)
        return len(frames)

    def pull_from_others(frames: int) -> None:
        if frames == 1:
            assert pull(second) == pull(third) == LAYERS * len(CHUNKS)
            assert forgotten == [second.agent.name]
            first.stage(CHUNKS[1])

    assert pull(first, pull_from_others) == LAYERS * (len(BEGUN) + 1)
    assert pull(second) == LAYERS * len(CHUNKS)  # it is met anew
    assert forgotten == [worker.agent.name for worker in (second, first, third)]
    client.close()


def frames_until_death(worker, client) -> int:
    """Return the frames of a pull in which the worker was killed at the third."""
    seen = 0

    def store(_frame):
        nonlocal seen
        seen += 1
        if seen == 3:
            worker.kill()

    with pytest.raises(KvTransferError):
        client.pull(worker.address, TICKET, FINGERPRINT, 0, 20.0).deliver_to(store)
    return seen


@pytest.fixture
def crowded(other) -> Iterator[tuple[Arena, NixlClient]]:
    """A decode worker with room for one frame, where each pull would read several ahead."""
    other.stage(*CHUNKS)
    landing = Arena(768)
    client = NixlClient(reader(), landing)
    client.start()
    yield landing, client
    client.close()


def pull_by(client, worker, timeout_s=20.0):
    return client.pull(worker.address, TICKET, FINGERPRINT, 0, timeout_s)


def test_a_pull_that_finds_no_room_stores_what_it_has_read(crowded, other):
    landing, client = crowded
    assert taken(pull_by(client, other).deliver_to, 0) == other.pull()
    assert landing.bytes_used == 0


def test_pulls_that_find_no_room_wait_for_each_other(crowded, other):
    landing, client = crowded
    with ThreadPoolExecutor(12) as threads:
        pulls = [threads.submit(taken, pull_by(client, other).deliver_to, 0) for _ in range(12)]
        assert all(pull.result() == other.pull() for pull in pulls)
    assert landing.bytes_used == 0


def test_room_that_others_give_back_is_used(crowded, other):
    landing, client = crowded
    others = [landing.take(768)]
    timer = threading.Timer(0.3, others.clear)
    timer.start()
    assert taken(pull_by(client, other).deliver_to, 0) == other.pull()
    timer.join()


def test_a_pull_does_not_wait_for_room_longer_than_for_a_message(crowded, other):
    landing, client = crowded
    others = landing.take(768)
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match="no room for"):
        taken(pull_by(client, other, 0.3).deliver_to, 0)
    assert 0.3 <= time.monotonic() - started_s < 15.0
    del others


def test_a_pull_that_waits_for_room_can_be_cancelled(crowded, other):
    landing, client = crowded
    others = landing.take(768)
    pull = pull_by(client, other, 60.0)
    threading.Timer(0.2, pull.cancel).start()
    started_s = time.monotonic()
    with pytest.raises(KvTransferError):
        taken(pull.deliver_to, 0)
    assert time.monotonic() - started_s < 15.0
    del others


@pytest.mark.parametrize("place", [0, 10, -1])
def test_memory_that_changes_behind_the_lease_is_found(other, place):
    other.stage(*CHUNKS)
    (lent, *_) = other.leases.stream(LEASE, SECRET, timeout_s=1.0)
    lent.message[place] ^= 0x01
    with pytest.raises(CorruptFrame):
        other.pull()


def test_frames_that_find_no_room_come_with_the_list(other):
    room = other.arena.take(other.arena.memory.nbytes)
    other.stage(*CHUNKS)
    assert len(other.pull()) == LAYERS * len(CHUNKS)
    del room
    assert other.arena.bytes_used == 0


def test_an_address_that_was_never_lent_is_refused(other):
    """It lies in no registered memory, so the library reads nothing."""
    other.astray = 1 << 40
    with pytest.raises(KvTransferError, match="nixl"):
        other.pull_lies([encode(Trailer(0), LEASE)] * 2)


def test_without_the_library_auto_is_grpc_and_nixl_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "nixl", None)
    monkeypatch.setitem(sys.modules, "nixl._api", None)
    assert agent_for("auto", encrypted=False) is None
    message = r"kv\.carrier: nixl .* allowed without it: auto, grpc, object_ref"
    with pytest.raises(InvalidConfiguration, match=message):
        agent_for("nixl", encrypted=False)
    with pytest.raises(InvalidConfiguration, match=message):
        require("nixl")
    require("auto")


@pytest.mark.parametrize(
    ("carrier", "encrypted", "used"),
    [
        ("auto", False, True),
        ("auto", True, False),
        ("nixl", True, True),
        ("grpc", False, False),
        ("object_ref", False, False),
    ],
)
def test_the_carrier_decides_whether_there_is_an_agent(carrier, encrypted, used):
    assert (agent_for(carrier, encrypted=encrypted) is not None) is used
