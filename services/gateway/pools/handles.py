"""Implements the pipeline's three ports over Ray Serve handles. Ray's errors become ours here."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle

from ...core import wire
from ...core.errors import (
    DeadlineExceeded,
    DecodeUnavailable,
    Overloaded,
    PrefillUnavailable,
    SpecPrefillError,
    SpeculatorLost,
    SpeculatorUnavailable,
    Unavailable,
)
from ...core.ports import Prefilling
from ...core.stream_timeout import StreamTimeout
from ...core.types import DecodeStep, Plan, PrefillResult, Replay, Request, Selection, Ticket
from ...kv.holding import RemoteLeases
from ...kv.prefilling import hold_prefill
from ..serve_internals import call_alone
from .affinity import load_of, stream_load_of, whole_load_of
from .health import SPECULATOR

logger = logging.getLogger(__name__)

Carried = dict[str, list[ray.ObjectRef]]  # lease id -> one object per rank; empty: gRPC carries

Item = TypeVar("Item")

_NO_SPECULATOR = "no speculator replica runs"
_RETRY_AFTER_S = 1.0
_SELF_TEST_S = 10.0  # to ask for its result
_SEVERAL = 2  # replicas: one that is lost has others beside it
_GRACE_S = 0.5  # for a replica's answer that the time was used up


@dataclass(frozen=True, slots=True)
class ServeSpeculator:
    """The speculator pool. Calls to one without replicas would wait: `is_empty` is asked before.

    Where none answers, `count` shows whether it has any replica. Where nobody counts them, there
    is one; where the controller has not answered yet, several.
    """

    handle: DeploymentHandle
    count: Callable[[], Awaitable[Mapping[str, int] | None]] | None = None
    is_empty: Callable[[str], Awaitable[bool]] | None = None
    _waking: set[asyncio.Task[None]] = field(default_factory=set)

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See `ports.Speculator`."""
        try:
            return await self._select(request, plan, timeout_s)
        except SpeculatorLost as error:
            if await self._replicas() < 2:  # the lost one is perhaps still among them
                raise SpeculatorUnavailable(str(error)) from error
            raise

    async def _select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        with map_errors("speculator", SpeculatorLost, broken=SpeculatorUnavailable):
            payload = wire.pack((request, plan, timeout_s))
            load = wire.pack(whole_load_of(request))
            await self._check_replicas()
            # The replica's own timeout comes first: it reports how the time was spent.
            try:
                reply = await _call(self.handle, "select", timeout_s + _GRACE_S, payload, load)
            except TimeoutError:
                if await self._replicas() == 0:
                    raise SpeculatorUnavailable(_NO_SPECULATOR) from None
                raise
            except BackPressureError:
                await self._check_replicas()
                raise
        return wire.unpack(reply, Selection)

    async def self_test(self) -> float | None:
        """Return the share of generated facts that the speculator keeps; None: not known."""
        with map_errors("speculator", SpeculatorUnavailable, broken=SpeculatorUnavailable):
            facts_kept: float | None = await _call(self.handle, "self_test", _SELF_TEST_S)
        return facts_kept

    async def _check_replicas(self) -> None:
        """Raises SpeculatorUnavailable where the pool is known to have no replica; wakes it."""
        if self.is_empty is None or not await self.is_empty(SPECULATOR):
            return
        if not self._waking:
            task = asyncio.create_task(self._wait_for_replica())
            self._waking.add(task)
            task.add_done_callback(self._waking.discard)
        raise SpeculatorUnavailable(_NO_SPECULATOR)

    async def _wait_for_replica(self) -> None:
        """Keep one call waiting: Serve's own autoscaling starts no replica without any."""
        with contextlib.suppress(SpecPrefillError):
            await self.self_test()

    async def _replicas(self) -> int:
        """Return the pool's running replicas; without any, calls wait until they time out."""
        if self.count is None:
            return 1
        counts = await self.count()
        return _SEVERAL if counts is None else counts[SPECULATOR]


@dataclass(frozen=True, slots=True)
class ServePrefiller:
    """The prefill pool. Leases are renewed directly at the worker that holds them.

    `carried` keeps the KV that Ray carries, by lease: dropping the references frees it.
    """

    handle: DeploymentHandle
    leases: RemoteLeases
    carried: Carried

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilling]:
        """See `ports.Prefiller`."""
        payload = wire.pack((request, selection, timeout_s))
        load = wire.pack(load_of(request, selection))
        call = self.handle.options(method_name="prefill", stream=True)
        steps = _stream(
            call, "prefill", PrefillUnavailable, timeout_s, (payload, load), _prefill_step
        )
        async with (
            aclosing(self._prefill_results(steps)) as results,
            hold_prefill(results, self.leases) as one,
        ):
            yield one

    async def _prefill_results(
        self, items: AsyncGenerator[Any]
    ) -> AsyncGenerator[Ticket | PrefillResult]:
        """Yield perhaps an early ticket, then the result. Objects are kept until this is closed."""
        async with aclosing(items):
            async for (early, prefilled), objects in items:
                if early is not None:
                    yield early
                elif prefilled is not None:
                    ticket = prefilled.ticket
                    lease_id = "" if ticket is None else ticket.lease.id
                    self.carried[lease_id] = objects
                    try:
                        yield prefilled
                    finally:
                        # In place: frames that wait for the garbage collector share the list.
                        self.carried.pop(lease_id, []).clear()


@dataclass(frozen=True, slots=True)
class ServeDecoder:
    """The decode pool. `carried` is the prefiller's."""

    handle: DeploymentHandle
    carried: Carried

    def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[DecodeStep]:
        """See `ports.Decoder`."""
        payload = wire.pack((request, selection, ticket, replay, timeout_s))
        objects = [] if ticket is None else self.carried.get(ticket.lease.id, [])
        load = wire.pack(stream_load_of(request, selection))
        call = self.handle.options(method_name="decode", stream=True)
        messages = payload, load, objects
        return _stream(call, "decode", DecodeUnavailable, timeout_s, messages, _decode_step)


async def _stream(
    handle: DeploymentHandle,
    pool: str,
    unavailable: type[Unavailable],
    timeout_s: float,
    messages: Sequence[object],
    read: Callable[[Any], Item],
) -> AsyncGenerator[Item]:
    """Call a replica and `read` what it streams, for at most `timeout_s`.

    Closing cancels the call. Every token passes here: one timer and one translation of errors for
    the whole stream.
    """
    with map_errors(pool, unavailable), StreamTimeout(timeout_s) as timeout:
        stream = call_alone(handle, *messages)
        try:
            while True:
                try:
                    item = await timeout.wait(anext(stream))
                except StopAsyncIteration:
                    return
                yield read(item)
        finally:
            stream.cancel()  # otherwise the replica continues without a reader


def _decode_step(payload: bytes) -> DecodeStep:
    return wire.unpack(payload, DecodeStep)


def _prefill_step(item: tuple[bytes, list[ray.ObjectRef]]) -> tuple[Any, list[ray.ObjectRef]]:
    payload, objects = item
    return wire.unpack(payload, wire.PREFILL_STEP), objects


@contextmanager
def map_errors(
    pool: str,
    unavailable: type[Unavailable],
    *,
    broken: type[SpecPrefillError] = SpecPrefillError,
) -> Iterator[None]:
    """Convert the errors of a call to a pool to ours.

    An error that a replica raised as one of ours comes out as the same one. `unavailable` is
    for replicas that could not be reached, `broken` for an unexpected failure: another
    replica would most likely fail in the same way.
    """
    try:
        yield
    except RayTaskError as error:  # first: it is also an instance of what it was caused by
        raise _root_error(pool, error, broken) from None
    except BackPressureError as error:
        raise _overload_error(pool, error) from error
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"timeout_s: the request timed out waiting for the {pool} pool"
        ) from error
    except (RayError, RayServeException, grpc.RpcError) as error:
        logger.warning("pool=%s unavailable: %s", pool, type(error).__name__)
        raise unavailable(f"no {pool} replica answered; try again") from error
    except SpecPrefillError:
        raise
    except Exception as error:  # gRPC handles raise a replica's own exception, of any type
        logger.exception("pool=%s failed", pool)
        raise broken(f"a {pool} replica failed") from error


async def _call(handle: DeploymentHandle, method: str, timeout_s: float, *messages: bytes) -> Any:
    response = call_alone(handle.options(method_name=method), *messages)
    try:
        async with asyncio.timeout(timeout_s):
            reply = await response
    except BaseException:
        response.cancel()  # the caller's cancellation is the replica's
        raise
    return reply


def _root_error(pool: str, error: RayTaskError, broken: type[SpecPrefillError]) -> SpecPrefillError:
    """Return the root error in the replica, or in a replica that it called."""
    cause: BaseException = error.cause
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, SpecPrefillError):
        return cause
    if isinstance(cause, BackPressureError):
        return _overload_error(pool, cause)
    logger.error("pool=%s failed: %s", pool, error)  # holds the remote traceback
    return broken(f"a {pool} replica failed")


def _overload_error(pool: str, error: BackPressureError) -> Overloaded:
    retry_after_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    return Overloaded(f"the {pool} pool is full; try again later", retry_after_s)
