"""Memory that pulls share: those that find no room get it in turn, and none waits for nothing."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from specprefill.core.errors import KvTransferError
from specprefill.kv.nixl.arena import Arena
from specprefill.kv.nixl.landing import LandingMemory

FRAME = 1024
PATIENCE_S = 20.0


def nothing() -> None:
    """A check that finds nothing wrong."""


def wait_until(true) -> None:
    give_up_s = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < give_up_s
        time.sleep(0.001)


@pytest.fixture
def landing():
    """Room for one frame."""
    return LandingMemory(Arena(FRAME))


@pytest.fixture
def threads():
    with ThreadPoolExecutor(8) as threads:
        yield threads


def test_room_that_is_free_need_not_be_waited_for(landing):
    taken = landing.take(FRAME)
    assert landing.take(FRAME) is None
    del taken
    assert len(landing.wait(FRAME, PATIENCE_S, nothing)) == FRAME


def test_room_that_is_given_back_ends_the_wait(landing, threads):
    taken = [landing.take(FRAME)]
    waiting = threads.submit(landing.wait, FRAME, PATIENCE_S, nothing)
    wait_until(lambda: landing._line)
    assert not waiting.done()
    taken.clear()
    assert len(waiting.result(PATIENCE_S)) == FRAME


def test_room_is_given_in_the_order_in_which_it_was_asked_for(landing, threads):
    taken, served = [landing.take(FRAME)], []

    def wait(name: int) -> None:
        room = landing.wait(FRAME, PATIENCE_S, nothing)
        served.append(name)
        del room

    waiting = []
    for name in range(6):
        waiting.append(threads.submit(wait, name))
        wait_until(lambda: len(landing._line) == len(waiting))
    taken.clear()
    for each in waiting:
        each.result(PATIENCE_S)
    assert served == list(range(6))


def test_nobody_overtakes_those_who_wait(threads):
    landing = LandingMemory(Arena(4 * FRAME))
    taken = [landing.take(FRAME) for _ in range(4)]
    waiting = threads.submit(landing.wait, 4 * FRAME, PATIENCE_S, nothing)
    wait_until(lambda: landing._line)
    taken.pop()
    assert landing.take(FRAME) is None  # although there is room for one
    taken.clear()
    assert len(waiting.result(PATIENCE_S)) == 4 * FRAME
    del waiting
    wait_until(lambda: landing.take(FRAME) is not None)


def test_a_wait_ends_after_its_time(landing):
    taken = landing.take(FRAME)
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match=r"no room for 1024 bytes to land for 0\.2 s"):
        landing.wait(FRAME, 0.2, nothing)
    assert 0.2 <= time.monotonic() - started_s < 10.0
    del taken
    assert len(landing.take(FRAME)) == FRAME  # nobody is left in line


def test_what_the_check_raises_ends_the_wait(landing, threads):
    taken, gone = landing.take(FRAME), threading.Event()

    def check() -> None:
        if gone.is_set():
            raise KvTransferError("the peer hung up")

    waiting = [threads.submit(landing.wait, FRAME, 60.0, check) for _ in range(2)]
    wait_until(lambda: len(landing._line) == 2)
    gone.set()
    for each in waiting:
        with pytest.raises(KvTransferError, match="the peer hung up"):
            each.result(PATIENCE_S)
    del taken


def test_what_can_never_land_is_refused_at_once(landing):
    with pytest.raises(KvTransferError, match="1025 bytes cannot land in 1024 bytes"):
        landing.wait(FRAME + 1, 60.0, nothing)


@pytest.mark.parametrize(
    "ask", [LandingMemory.take, lambda *ask: LandingMemory.wait(*ask, 5.0, nothing)]
)
def test_memory_that_is_no_longer_needed_is_reclaimed_first(ask):
    unneeded = []

    def reclaim() -> bool:
        if unneeded:
            unneeded.pop()
            return True
        return False

    landing = LandingMemory(Arena(2 * FRAME), reclaim)
    unneeded += [landing.take(FRAME), landing.take(FRAME)]
    assert len(ask(landing, 2 * FRAME)) == 2 * FRAME
    assert unneeded == []
