"""Leases: bounded in time and bytes, released once, never forgotten."""

import threading

import pytest

from specprefill.core.errors import LeaseNotFound
from specprefill.kv.frames import SealedFrame
from specprefill.kv.leases import UNCLAIMED_S, LeaseStore


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


def frame(layer: int, size: int = 100) -> SealedFrame:
    return SealedFrame(layer, 0, 4, bytes(size))


def hold(store, lease_id="a", layers=2):
    store.open(lease_id, "secret")
    for layer in range(layers):
        store.append(lease_id, frame(layer), last=layer == layers - 1)


def test_a_lease_can_be_pulled_until_it_is_released(store):
    hold(store)
    for pulls in (1, 2, 3):
        assert [f.layer for f in store.stream("a", "secret", timeout_s=1)] == [0, 1]
        assert store.gauges().pulled_total == pulls
    assert store.gauges().bytes_held == 200
    assert store.release("a", "secret") is True
    gauges = store.gauges()
    assert (gauges.leases, gauges.bytes_held, gauges.released_total) == (0, 0, 1)
    with pytest.raises(LeaseNotFound, match="released"):
        list(store.stream("a", "secret", timeout_s=1))


def test_a_lease_without_kv_is_read_to_its_end_at_once(store):
    store.open("a", "secret")
    store.complete("a")
    store.complete("never opened")
    assert list(store.stream("a", "secret", timeout_s=1)) == []
    assert (store.gauges().leases, store.gauges().pulled_total) == (1, 1)


def test_a_reader_of_a_lease_without_kv_waits_for_its_end_only(store):
    store.open("a", "secret")
    completing = threading.Timer(0.1, store.complete, ["a"])
    completing.start()
    assert list(store.stream("a", "secret", timeout_s=20)) == []
    completing.join()


def test_a_lease_without_kv_ends_as_any_other(store, clock):
    store.open("a", "secret")
    store.complete("a")
    clock.now_s += 1000
    assert store.sweep() == 0  # its ticket was not issued
    store.issue("a")
    clock.now_s += UNCLAIMED_S
    assert store.sweep() == 1


def test_a_pull_broken_off_is_not_counted(store):
    hold(store)
    stream = store.stream("a", "secret", timeout_s=1)
    next(stream)
    stream.close()
    assert (store.gauges().leases, store.gauges().pulled_total) == (1, 0)
    assert len(list(store.stream("a", "secret", timeout_s=1))) == 2


def test_the_secret_is_needed_to_pull_and_to_release(store):
    hold(store)
    with pytest.raises(LeaseNotFound):
        list(store.stream("a", "wrong", timeout_s=1))
    assert store.renew("a", "wrong") is False
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


def test_a_lease_that_nobody_claims_expires_early(store, clock):
    """Its ticket was lost on the way: the gateway was cancelled, or died."""
    hold(store)
    store.issue("a")
    clock.now_s += UNCLAIMED_S - 0.1
    assert store.sweep() == 0
    clock.now_s += 0.1
    assert store.sweep() == 1
    gauges = store.gauges()
    assert (gauges.bytes_held, gauges.expired_total, gauges.stranded_bytes_total) == (0, 1, 200)
    with pytest.raises(LeaseNotFound, match="expired"):
        list(store.stream("a", "secret", timeout_s=1))


def test_a_lease_does_not_age_before_its_ticket_is_issued(store, clock):
    """The engine may take seconds over the step that samples the first token."""
    hold(store)
    clock.now_s += 10 * UNCLAIMED_S
    assert store.sweep() == 0
    store.issue("a")
    clock.now_s += UNCLAIMED_S - 0.1
    assert store.sweep() == 0
    assert len(list(store.stream("a", "secret", timeout_s=1))) == 2


def test_a_frame_wakes_the_readers_of_its_own_lease_only(store):
    """With 64 readers of other leases, each frame once cost a millisecond of wake-ups."""
    for lease_id in ("a", "b"):
        store.open(lease_id, "secret")
    woken = []
    other = store._leases["b"].changed
    other.notify_all = lambda: woken.append("b")
    store.append("a", frame(0), last=False)
    assert woken == []
    store.append("b", frame(0), last=False)
    assert woken == ["b"]


@pytest.mark.parametrize("claim", ["pull", "renew", "renew_early"])
def test_a_lease_lasts_its_time_from_the_last_claim(store, clock, claim):
    if claim == "renew_early":  # while the KV is still being computed
        store.open("a", "secret")
        assert store.renew("a", "secret") is True
    hold(store)
    clock.now_s += 1
    if claim == "pull":
        list(store.stream("a", "secret", timeout_s=1))
    elif claim == "renew":
        assert store.renew("a", "secret") is True
    clock.now_s += 28.9
    assert store.sweep() == 0
    clock.now_s += 1.1
    assert store.sweep() == 1
    assert store.renew("a", "secret") is False


def test_a_lease_lives_as_long_as_it_is_renewed(store, clock):
    hold(store)
    for _ in range(10):
        assert store.renew("a", "secret") is True
        clock.now_s += 29
        assert store.sweep() == 0
    clock.now_s += 1
    assert store.sweep() == 1


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
    store.open("a", "secret")
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
    store.open("a", "secret")
    store.append("a", frame(0), last=False)
    stream = store.stream("a", "secret", timeout_s=5)
    next(stream)
    store.release("a", "secret")
    with pytest.raises(LeaseNotFound, match="released"):
        next(stream)


def test_a_pull_of_a_lease_that_never_completes_gives_up(store, clock):
    store.open("a", "secret")
    stream = store.stream("a", "secret", timeout_s=0.0)
    with pytest.raises(LeaseNotFound, match="no new frame"):
        next(stream)


def test_a_lease_knows_how_long_it_has_been_complete(store, clock):
    store.open("a", "secret")
    assert store.complete_for_s("a") is None
    hold(store)
    clock.now_s += 1.5
    assert store.complete_for_s("a") == 1.5
    store.release("a", "secret")
    assert store.complete_for_s("a") is None


def test_a_pull_that_overtakes_the_opening_of_its_lease_waits_for_it(store):
    """The ticket goes another way than the order to hold."""
    pulled = []
    puller = threading.Thread(
        target=lambda: pulled.extend(store.stream("late", "secret", timeout_s=10))
    )
    puller.start()
    hold(store, "late")
    puller.join(10)
    assert [frame.layer for frame in pulled] == [0, 1]


def test_a_lease_that_was_never_opened_is_not_found_in_a_moment(store):
    with pytest.raises(LeaseNotFound, match="unknown"):
        list(store.stream("never", "secret", timeout_s=0.05))
