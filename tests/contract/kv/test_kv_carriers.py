"""KV, whoever carries it: whole, authenticated, and never taken for what it is not."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from specprefill.core.errors import KvTransferError, LayoutMismatch, LeaseNotFound
from specprefill.core.types import Lease
from specprefill.kv import rpc
from specprefill.kv.frames import Frame, Trailer, encode
from specprefill.kv.tls import read_tls
from tests.certificates import Authority
from tests.contract.kv.carriers import (
    CHUNKS,
    LAYERS,
    LEASE,
    SECRET,
    TICKET,
    TOKENS,
    Carrier,
    LentObjectRef,
    Nixl,
    ObjectRef,
    payload,
)

KINDS = {"grpc": Carrier, "nixl": Nixl, "object_ref": ObjectRef, "object_ref_lent": LentObjectRef}


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    return read_tls(Authority(tmp_path_factory.mktemp("authority")).files())


@pytest.fixture(params=[*KINDS, *(f"{kind}_tls" for kind in KINDS)])
def carrier(request, tls) -> Iterator[Carrier]:
    kind = KINDS[request.param.removesuffix("_tls")]
    carrier = kind(tls if request.param.endswith("_tls") else None)
    carrier.start()
    yield carrier
    carrier.stop()


def whole(start: int = 0) -> list[Frame]:
    """Every frame of the prompt, from token `start` on."""
    spans = [(max(first, start), stop) for first, stop in CHUNKS if stop > start]
    return [
        Frame(layer, first, stop, payload(layer, first, stop))
        for layer in range(LAYERS)
        for first, stop in spans
    ]


def test_what_was_staged_is_what_comes(carrier):
    carrier.stage(*CHUNKS)
    assert carrier.pull() == whole()


def test_only_the_prompts_own_tokens_travel(carrier):
    """The last block is trimmed: nothing behind the last token comes."""
    carrier.stage(*CHUNKS)
    frames = carrier.pull()
    assert sum(len(frame.payload) for frame in frames) == LAYERS * len(payload(0, 0, TOKENS))
    assert max(frame.stop for frame in frames) == TOKENS


@pytest.mark.parametrize("start", [1, 40, 50, TOKENS - 1])
def test_a_prefix_that_the_other_side_has_is_left_out(carrier, start):
    carrier.stage(*CHUNKS)
    assert carrier.pull(start=start) == whole(start)


def test_a_pull_may_begin_before_the_end_is_computed(carrier):
    carrier.stage(CHUNKS[0])
    threading.Timer(0.1, carrier.stage, CHUNKS[1:]).start()
    assert carrier.pull() == whole()


@pytest.mark.parametrize(
    ("asked", "error"),
    [
        ({"ticket": replace(TICKET, lease=Lease("other", SECRET))}, LeaseNotFound),
        ({"ticket": replace(TICKET, lease=Lease(LEASE, "wrong"))}, LeaseNotFound),
        ({"fingerprint": "another layout"}, LayoutMismatch),
    ],
    ids=["other_lease", "wrong_secret", "other_layout"],
)
def test_a_pull_without_the_right_is_refused(carrier, asked, error):
    carrier.stage(*CHUNKS)
    with pytest.raises(error):
        carrier.pull(**asked)
    assert carrier.leases.gauges().pulled_total == 0
    assert carrier.leases.gauges().leases == 1


@pytest.mark.parametrize("kind", [Carrier, Nixl])
def test_pulls_beyond_the_limit_wait_for_a_place(kind, monkeypatch):
    monkeypatch.setitem(rpc._MOST_AT_ONCE, rpc.PULL, 1)
    monkeypatch.setattr(rpc, "_MOST_LENDINGS", 1)
    carrier = kind()
    carrier.start()
    carrier.stage(CHUNKS[0])
    threading.Timer(0.2, carrier.stage, CHUNKS[1:]).start()
    with ThreadPoolExecutor(6) as threads:
        pulls = [threads.submit(carrier.pull) for _ in range(6)]
        assert all(pull.result() == whole() for pull in pulls)
    carrier.stop()


def test_pulling_an_expired_lease_fails_at_once(carrier):
    carrier.stage(*CHUNKS)
    carrier.leases.issue(LEASE)
    carrier.clock.ahead_s = 60.0
    assert carrier.leases.sweep() == 1
    started_s = time.monotonic()
    with pytest.raises(LeaseNotFound, match="expired"):
        carrier.pull()
    assert time.monotonic() - started_s < 20.0


def test_pulling_a_released_lease_fails_at_once(carrier):
    carrier.stage(CHUNKS[0])
    carrier.leases.release(LEASE, SECRET)
    started_s = time.monotonic()
    with pytest.raises(LeaseNotFound, match="released"):
        carrier.pull()
    assert time.monotonic() - started_s < 20.0


def test_a_lease_released_under_its_reader_ends_the_pull(carrier):
    carrier.stage(CHUNKS[0])
    threading.Timer(0.1, carrier.leases.release, (LEASE, SECRET)).start()
    with pytest.raises(LeaseNotFound, match="released"):
        carrier.pull()
    assert carrier.leases.gauges().released_total == 1


def test_a_worker_started_anew_at_the_same_address_has_nothing_of_the_old_one(carrier):
    carrier.stage(*CHUNKS)
    carrier.pull()
    carrier.restart()
    with pytest.raises(LeaseNotFound, match="unknown"):
        carrier.pull()
    carrier.stage(*CHUNKS)
    assert carrier.pull() == whole()


def test_pulling_from_a_worker_that_is_gone_fails_at_once(carrier):
    carrier.server.stop()
    started_s = time.monotonic()
    with pytest.raises(KvTransferError, match="UNAVAILABLE"):
        carrier.pull()
    assert time.monotonic() - started_s < 20.0


def test_nothing_is_held_when_the_lease_is_released(carrier):
    carrier.stage(*CHUNKS)
    assert carrier.bytes_held() > 0
    carrier.pull()
    carrier.leases.release(LEASE, SECRET)
    assert carrier.leases.gauges().released_total == 1
    give_up_s = time.monotonic() + 20.0
    while carrier.bytes_held() and time.monotonic() < give_up_s:
        time.sleep(0.001)  # the peer's hanging up is on its way
    assert carrier.bytes_held() == 0


GOOD = [encode(item, LEASE) for item in (*whole(), Trailer(len(whole())))]


def test_a_peer_that_does_not_lie_is_believed(carrier):
    assert carrier.pull_lies(GOOD) == whole()


@pytest.mark.parametrize(
    "messages",
    [
        GOOD[:-1],
        GOOD[:1] + GOOD[2:],
        [*GOOD[:2], GOOD[1], *GOOD[2:]],
        [*GOOD[:-2], GOOD[-1], GOOD[-2]],
        [encode(whole()[0], "another lease"), *GOOD[1:]],
        [*GOOD[:-1], encode(Trailer(len(whole())), "another lease")],
        [GOOD[0][:-1], *GOOD[1:]],
        [GOOD[0] + b"x", *GOOD[1:]],
        [],
    ],
    ids=[
        "no_trailer",
        "frame_lost",
        "frame_twice",
        "frame_late",
        "foreign_frame",
        "foreign_trailer",
        "frame_truncated",
        "frame_longer",
        "nothing",
    ],
)
def test_a_stream_that_is_not_whole_is_refused(carrier, messages):
    with pytest.raises(KvTransferError):
        carrier.pull_lies(messages)


@pytest.mark.parametrize("message", [0, 2, -1])
@pytest.mark.parametrize("place", [0, 6, 12, -1])
def test_a_byte_that_flips_is_found(carrier, message, place):
    hurt = bytearray(GOOD[message])
    hurt[place] ^= 0x10
    messages = list(GOOD)
    messages[message] = bytes(hurt)
    with pytest.raises(KvTransferError):
        carrier.pull_lies(messages)


@pytest.mark.parametrize("carrier", ["grpc", "nixl"], indirect=True)
def test_a_cancelled_pull_leaves_the_lease(carrier):
    """Objects are collected whole before anybody can cancel a pull of them."""
    carrier.stage(CHUNKS[0])
    running = carrier.begin()
    threading.Timer(0.05, running.cancel).start()
    with pytest.raises(KvTransferError, match="CANCELLED"):
        running.deliver_to(lambda _frame: None)
    assert carrier.leases.gauges().leases == 1
