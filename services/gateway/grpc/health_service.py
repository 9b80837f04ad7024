"""`grpc.health.v1`, which Kubernetes' probes and Envoy speak. Needs no API key."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import contextmanager

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse

from ...core.errors import Overloaded
from ..openai.access import RequestLimit
from ..openai.failures import rpc_failure
from ..pools.health import PoolCounts, judge
from .api import CallContext

SERVICE = "specprefill.v1.SpecPrefill"
# In one gateway. A load balancer holds one or a few; anybody may watch, and a stream has no end.
MOST_WATCHERS = 64
# Serve asks a gateway every `health_check_period_s`, until it replaces it: then streams must end,
# or they hold the gateway for as long as its longest request may last. As Serve's controller may
# only be away, they end without a status.
LEAST_UNATTENDED_S = 15.0
UNATTENDED_PERIODS = 3
_PERIOD_S = 1.0  # between two polls of the pools, for those who watch

_State = tuple[int | None, bool]  # the status if there is one to send, and whether streams end


class GrpcHealth:
    """SERVING while prompts can be answered, and the gateway takes new ones."""

    def __init__(
        self,
        count: PoolCounts,
        limit: RequestLimit,
        attend_period_s: Callable[[], float],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """`attend_period_s` returns the seconds between two calls of `attend`."""
        self._count = count
        self._limit = limit
        self._attend_period_s = attend_period_s
        self._now = now
        self._attended_s = now()
        self._poll = _SharedPoll(self._state)

    def attend(self) -> None:
        """Note that Serve has asked for the health of this gateway."""
        self._attended_s = self._now()

    async def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """Return the state now; a service that is not ours is SERVICE_UNKNOWN."""
        return _response(request, await self._status())

    async def watch(
        self, request: HealthCheckRequest, context: CallContext
    ) -> AsyncGenerator[HealthCheckResponse, None]:
        """Stream the state now, and each change, until this gateway goes.

        RESOURCE_EXHAUSTED beyond MOST_WATCHERS.
        """
        try:
            with self._poll.join():
                state: _State | None = None
                last: HealthCheckResponse | None = None
                while state is None or not state[1]:
                    state = await self._poll.next_state(state)
                    if state[0] is None:
                        return
                    now = _response(request, state[0])
                    if now != last:
                        last = now
                        yield now
        except Overloaded as error:
            failure = rpc_failure(error)
            context.set_code(failure.code)
            context.set_details(failure.details)
            raise failure from error

    async def list(self) -> HealthListResponse:
        """Return the state of every service."""
        state = await self.check(HealthCheckRequest())
        return HealthListResponse(statuses={"": state, SERVICE: state})

    async def _state(self) -> _State:
        drains = self._limit.draining
        if not drains and not self._is_attended():
            return None, True
        return await self._status(), drains

    def _is_attended(self) -> bool:
        longest_s = max(LEAST_UNATTENDED_S, UNATTENDED_PERIODS * self._attend_period_s())
        return self._now() - self._attended_s <= longest_s

    async def _status(self) -> int:
        if self._limit.draining or not judge(await self._count()).serving:
            return int(HealthCheckResponse.NOT_SERVING)
        return int(HealthCheckResponse.SERVING)


def _response(request: HealthCheckRequest, status: int) -> HealthCheckResponse:
    known = request.service in ("", SERVICE)
    return HealthCheckResponse(status=status if known else HealthCheckResponse.SERVICE_UNKNOWN)


class _SharedPoll:
    """Reads the state once a period for all watchers together, while there are any."""

    def __init__(self, read: Callable[[], Awaitable[_State]]) -> None:
        self._read = read
        self._watchers = 0
        self._state: _State | None = None  # None: not read yet
        self._changed = asyncio.Event()  # another one after each change
        self._task: asyncio.Task[None] | None = None

    @contextmanager
    def join(self) -> Iterator[None]:
        """Watch while inside. Raises Overloaded if MOST_WATCHERS do already."""
        if self._watchers >= MOST_WATCHERS:
            raise Overloaded(
                f"this gateway streams its health to {MOST_WATCHERS} watchers already; "
                "call Check, or watch later",
                reason="too_many_watchers",
            )
        if self._task is None or self._task.done():  # done: it failed, and not all have left yet
            self._state, self._task = None, asyncio.create_task(self._run())
        self._watchers += 1
        try:
            yield
        finally:
            self._watchers -= 1
            if self._watchers == 0:
                self._task.cancel()
                self._task = None

    async def next_state(self, last: _State | None) -> _State:
        """Wait for a state other than `last`. Raises the error that ended the poll."""
        while self._state is None or self._state == last:
            if self._task is not None and self._task.done():
                self._task.result()
            await self._changed.wait()
        return self._state

    async def _run(self) -> None:
        try:
            while True:
                state = await self._read()
                if state != self._state:
                    self._state = state
                    self._wake()
                await asyncio.sleep(_PERIOD_S)
        finally:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
