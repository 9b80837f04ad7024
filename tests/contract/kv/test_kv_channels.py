"""Channels to peers that are gone are closed, and none that a call uses. Over real gRPC."""

from __future__ import annotations

import asyncio
import time

import grpc
import msgpack
import pytest

from specprefill.kv import channels
from specprefill.kv.announcements import Announcement, Announcements
from specprefill.kv.channels import AioChannels, Channels
from specprefill.kv.leases import LeaseStore
from specprefill.kv.rpc import STATS, WATCH, KvServer

ANNOUNCED = Announcement("lease", 16, "layout")


class Worker:
    """A prefill worker's port."""

    def __init__(self) -> None:
        self.announcements = Announcements()
        leases = LeaseStore(max_bytes=1 << 20, lease_s=30.0, now=time.monotonic)
        self._server = KvServer(leases, self.announcements, "layout", "127.0.0.1")
        self.address = self._server.start()

    def stop(self) -> None:
        self._server.stop()


@pytest.fixture
def workers():
    started = [Worker() for _ in range(4)]
    yield started
    for worker in started:
        worker.stop()


@pytest.fixture
def opened(monkeypatch):
    """Every channel that was opened, in order."""
    seen = []
    for name in ("open_channel", "open_aio_channel"):
        original = getattr(channels, name)

        def open_seen(peer, tls, original=original):
            seen.append(original(peer, tls))
            return seen[-1]

        monkeypatch.setattr(channels, name, open_seen)
    return seen


def is_closed(channel) -> bool:
    try:
        channel.unary_unary(STATS)(msgpack.packb({}), timeout=5.0)
    except ValueError:
        return True
    return False


def watch_shortly(kept, worker) -> None:
    kept.stream(worker.address, WATCH, b"").cancel()


def test_the_channel_that_was_not_used_for_longest_is_closed(workers, opened):
    first, second, third, _ = workers
    kept = Channels(None, most=2)
    for worker in (first, second, first, third):
        watch_shortly(kept, worker)
    assert [is_closed(channel) for channel in opened] == [False, True, False]
    watch_shortly(kept, second)  # a new one
    assert [is_closed(channel) for channel in opened] == [True, True, False, False]
    kept.close()
    assert all(is_closed(channel) for channel in opened)


def test_a_channel_that_a_call_uses_stays_open(workers, opened):
    kept = Channels(None, most=1)
    watch = kept.stream(workers[0].address, WATCH, b"")
    for worker in workers[1:]:
        watch_shortly(kept, worker)
    assert [is_closed(channel) for channel in opened] == [False, True, True, False]
    assert watch.is_active()
    watch.cancel()
    watch_shortly(kept, workers[1])
    assert [is_closed(channel) for channel in opened] == [True, True, True, True, False]
    kept.close()


async def stats(kept, worker):
    return msgpack.unpackb(await (await kept.ask(worker.address, STATS, msgpack.packb({}), 5.0)))


def is_aio_closed(channel) -> bool:
    return channel.get_state() is grpc.ChannelConnectivity.SHUTDOWN


async def test_so_it_is_from_asyncio(workers, opened):
    first, second, third, fourth = workers
    kept = AioChannels(None, most=2)
    watch = await kept.stream(first.address, WATCH, b"")
    heard = asyncio.ensure_future(anext(aiter(watch)))
    for worker in (second, third, fourth):
        assert (await stats(kept, worker))["leases"] == 0
    assert [is_aio_closed(channel) for channel in opened] == [False, True, False, False]
    while not heard.done():
        first.announcements.announce(ANNOUNCED)
        await asyncio.wait([heard], timeout=0.01)
    assert Announcement(**msgpack.unpackb(heard.result())) == ANNOUNCED
    watch.cancel()
    await stats(kept, third)
    assert [is_aio_closed(channel) for channel in opened] == [True, True, False, False]
    await kept.close()
