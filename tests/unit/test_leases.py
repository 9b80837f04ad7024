"""Leases: bounded in time and bytes, released once, never forgotten."""

import threading

import pytest

from specprefill.errors import LeaseNotFound
from specprefill.kv.frames import Frame
from specprefill.kv.leases import LeaseStore


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def store(clock):
    return LeaseStore(max_bytes=1000, lease_s=30.0, now=clock)


def frame(layer: int, size: int = 100) -> Frame:
    return Frame(layer, 0, 4, bytes(size))


def hold(store, lease_id="a", layers=2, uses=1):
    store.open(lease_id, "secret", tokens=4, uses=uses)
    for layer in range(layers):
        store.append(lease_id, frame(layer), last=layer == layers - 1)


def test_a_pulled_lease_is_gone_and_its_bytes_are_free(store):
    hold(store)
    assert store.gauges().bytes_held == 200
    assert [f.layer for f in store.stream("a", "secret", timeout_s=1)] == [0, 1]
    gauges = store.gauges()
    assert (gauges.leases, gauges.bytes_held, gauges.pulled_total) == (0, 0, 1)
    with pytest.raises(LeaseNotFound, match="pulled"):
        list(store.stream("a", "secret", timeout_s=1))


def test_a_lease_for_three_samples_is_pulled_three_times(store):
    hold(store, uses=3)
    for _ in range(3):
        assert len(list(store.stream("a", "secret", timeout_s=1))) == 2
    assert store.gauges().leases == 0


def test_a_pull_broken_off_does_not_use_the_lease_up(store):
    hold(store)
    stream = store.stream("a", "secret", timeout_s=1)
    # The first batch is handed out whole; closing before its end leaves the lease.
    next(stream)
    stream.close()
    assert store.gauges().leases == 1
    assert len(list(store.stream("a", "secret", timeout_s=1))) == 2


def test_the_secret_is_needed_to_pull_and_to_release(store):
    hold(store)
    with pytest.raises(LeaseNotFound):
        list(store.stream("a", "wrong", timeout_s=1))
    assert store.release("a", "wrong") is False
    assert store.gauges().leases == 1


def test_release_is_idempotent_and_beats_a_late_frame(store):
    hold(store)
    assert store.release("a", "secret") is True
    assert store.release("a", "secret") is False
    store.append("a", frame(2), last=True)
    assert store.gauges().bytes_held == 0


def test_a_release_before_the_first_frame_is_remembered(store):
    store.release("a", "secret")
    hold(store)
    assert (store.gauges().leases, store.gauges().opened_total) == (0, 0)


def test_an_unpulled_lease_expires_and_a_late_pull_is_told_why(store, clock):
    hold(store)
    clock.now_s += 29.9
    assert store.sweep() == 0
    clock.now_s += 0.1
    assert store.sweep() == 1
    gauges = store.gauges()
    assert (gauges.bytes_held, gauges.expired_total, gauges.stranded_bytes_total) == (0, 1, 200)
    with pytest.raises(LeaseNotFound, match="expired"):
        list(store.stream("a", "secret", timeout_s=1))


def test_a_lease_is_not_expired_under_its_reader(store, clock):
    hold(store)
    stream = store.stream("a", "secret", timeout_s=1)
    next(stream)
    clock.now_s += 31
    assert store.sweep() == 0
    assert len(list(stream)) == 1


def test_over_the_byte_cap_the_lease_is_dropped_whole(store):
    hold(store, "a", layers=6)
    hold(store, "b", layers=6)
    gauges = store.gauges()
    assert (gauges.leases, gauges.bytes_held, gauges.dropped_total) == (1, 600, 1)
    with pytest.raises(LeaseNotFound, match="dropped"):
        list(store.stream("b", "secret", timeout_s=1))


def test_a_pull_waits_for_frames_still_being_computed(store):
    store.open("a", "secret", tokens=4, uses=1)
    store.append("a", frame(0), last=False)
    got: list[int] = []
    first = threading.Event()

    def pull():
        for item in store.stream("a", "secret", timeout_s=5):
            got.append(item.layer)
            first.set()

    puller = threading.Thread(target=pull)
    puller.start()
    assert first.wait(5)
    store.append("a", frame(1), last=True)
    puller.join(5)
    assert got == [0, 1]


def test_a_release_ends_a_pull_that_waits(store):
    store.open("a", "secret", tokens=4, uses=1)
    store.append("a", frame(0), last=False)
    stream = store.stream("a", "secret", timeout_s=5)
    next(stream)
    store.release("a", "secret")
    with pytest.raises(LeaseNotFound, match="released"):
        next(stream)


def test_a_pull_of_a_lease_that_never_completes_gives_up(store, clock):
    store.open("a", "secret", tokens=4, uses=1)
    stream = store.stream("a", "secret", timeout_s=0.0)
    with pytest.raises(LeaseNotFound, match="not complete"):
        next(stream)
