"""A call that its peer refuses is started again, and no other is."""

from __future__ import annotations

import time

import grpc
import pytest

from specprefill.kv.refusals import PersistentCall

REFUSED = grpc.StatusCode.RESOURCE_EXHAUSTED


class Failure(grpc.RpcError):
    def __init__(self, code: grpc.StatusCode) -> None:
        super().__init__()
        self._code = code

    def code(self) -> grpc.StatusCode:
        return self._code


class Call:
    """Answers with messages, and fails at a status."""

    def __init__(self, *answers: bytes | grpc.StatusCode) -> None:
        self._answers = iter(answers)
        self.cancelled = False

    def __next__(self) -> bytes:
        answer = next(self._answers)
        if isinstance(answer, bytes):
            return answer
        raise Failure(answer)

    def cancel(self) -> None:
        self.cancelled = True


def persistent(calls: list[Call], retry_s: float = 60.0) -> PersistentCall:
    return PersistentCall(iter(calls).__next__, retry_s)


def test_a_refused_call_is_started_again():
    call = persistent([Call(REFUSED), Call(REFUSED), Call(b"one", b"two")])
    assert list(call) == [b"one", b"two"]


@pytest.mark.parametrize("status", [grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE])
def test_a_call_that_fails_otherwise_is_not(status):
    call = persistent([Call(status), Call(b"one")])
    with pytest.raises(Failure) as failed:
        next(call)
    assert failed.value.code() is status


def test_a_call_that_was_answered_is_not():
    call = persistent([Call(b"one", REFUSED), Call(b"one")])
    assert next(call) == b"one"
    with pytest.raises(Failure):
        next(call)


@pytest.mark.parametrize("retry_s", [0.0, 0.2])
def test_it_is_not_started_again_when_its_time_is_over(retry_s):
    calls = [Call(REFUSED) for _ in range(1000)]
    started_s = time.monotonic()
    with pytest.raises(Failure):
        next(persistent(calls, retry_s))
    assert time.monotonic() - started_s < retry_s + 5.0


def test_a_cancelled_call_is_not_started_again():
    calls = [Call(REFUSED), Call(b"one")]
    call = persistent(calls)
    call.cancel()
    assert calls[0].cancelled
    with pytest.raises(Failure):
        next(call)


def test_a_cancel_during_the_start_reaches_the_new_call():
    first, second = Call(REFUSED), Call(grpc.StatusCode.CANCELLED)
    starting = iter([first, second])

    def start() -> Call:
        new = next(starting)
        if new is second:
            call.cancel()
        return new

    call = PersistentCall(start, 60.0)
    with pytest.raises(Failure):
        next(call)
    assert second.cancelled
