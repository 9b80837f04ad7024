"""Ends a stream that has been silent for too long, however long it lasts as a whole.

A sender that has nothing for this reader sends an empty message now and then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

from ..core.errors import KvTransferError

BEAT_S = 0.5
_BEAT = b""


def with_beats(messages: Iterator[bytes | None]) -> Iterator[bytes]:
    """Yield the messages; where None stands for one that the reader needs not, a beat at times."""
    sent_s = time.monotonic()
    for message in messages:
        if message is None and time.monotonic() - sent_s < BEAT_S:
            continue
        yield _BEAT if message is None else message
        sent_s = time.monotonic()


def messages_of(call: Any, silence_s: float) -> Iterator[bytes]:
    """Yield a gRPC stream's messages; cancel the call when none comes for `silence_s`.

    KV is pulled while its prompt is computed, which takes as long as it takes, but layer follows
    layer. Time that the caller spends between two messages does not count.

    Raises KvTransferError after such a silence, and what the call raises.
    """
    watch = _Watch(silence_s, call.cancel)
    try:
        while True:
            watch.listen()
            message = next(call, None)
            watch.pause()
            if message is None:
                return
            if message:  # no beat
                yield message
    except grpc.RpcError as error:
        if watch.has_ended:
            raise KvTransferError(f"kv: nothing came for {silence_s:g} s") from error
        raise
    finally:
        watch.stop()


class _Watch:
    """Calls `end` once it has listened for `silence_s`. A timer looks after it now and then."""

    def __init__(self, silence_s: float, end: Callable[[], object]) -> None:
        self._silence_s = silence_s
        self._end = end
        self._since_s: float | None = None  # that it has listened
        self._stopped = False
        self.has_ended = False
        self._look_after(silence_s)

    def listen(self) -> None:
        self._since_s = time.monotonic()

    def pause(self) -> None:
        self._since_s = None

    def stop(self) -> None:
        self._stopped = True
        self._timer.cancel()

    def _look_after(self, seconds: float) -> None:
        self._timer = threading.Timer(seconds, self._look)
        self._timer.daemon = True
        self._timer.start()

    def _look(self) -> None:
        since_s = self._since_s
        silent_s = 0.0 if since_s is None else time.monotonic() - since_s
        if silent_s >= self._silence_s:
            self.has_ended = True
            self._end()
        elif not self._stopped:
            self._look_after(self._silence_s - silent_s)
