"""Starts a call again while its peer refuses it because it has too many at once."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc

_FIRST_S = 0.02
_LONGEST_S = 0.5


class PersistentCall:
    """A gRPC call that is answered with a stream; once a message came, it is not started again."""

    def __init__(self, start: Callable[[], Any], retry_s: float) -> None:
        """Start the call; for `retry_s` seconds, again where RESOURCE_EXHAUSTED answers it."""
        self._start = start
        self._give_up_s = time.monotonic() + retry_s
        self._pauses_s = _pauses_s()
        self._answered = False
        self._cancelled = threading.Event()
        self._call = start()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        """Return the next message. Raises what the call raises, and what starting it does."""
        while True:
            try:
                message: bytes = next(self._call)
            except grpc.RpcError as error:
                if not self._may_restart(error):
                    raise
                self._restart()
            else:
                self._answered = True
                return message

    def cancel(self) -> None:
        """End the call, from any thread."""
        self._cancelled.set()
        self._call.cancel()

    def is_active(self) -> bool:
        """Return True while messages may come from the peer."""
        return bool(self._call.is_active())

    def done(self) -> bool:
        """Return True once the call has ended."""
        return bool(self._call.done())

    def _may_restart(self, error: grpc.RpcError) -> bool:
        """Pause, and return True, if the call was refused and time is left."""
        if self._answered or error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
            return False
        pause_s = next(self._pauses_s)
        if time.monotonic() + pause_s > self._give_up_s:
            return False
        return not self._cancelled.wait(pause_s)

    def _restart(self) -> None:
        self._call = self._start()
        if self._cancelled.is_set():  # meanwhile
            self._call.cancel()


def _pauses_s() -> Iterator[float]:
    """Yield pauses that grow, at random, so that those refused together do not return together."""
    most_s = _FIRST_S
    while True:
        yield random.uniform(most_s / 2, most_s)
        most_s = min(2 * most_s, _LONGEST_S)
