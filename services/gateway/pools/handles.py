"""The pipeline's three ports over Ray Serve handles. Ray's errors become ours here."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

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
    SpeculatorUnavailable,
    Unavailable,
)
from ...core.ports import Prefilling
from ...core.types import Decoded, Plan, Prefilled, Replay, Request, Selection, Ticket
from ...kv.holding import RemoteLeases
from ...kv.prefilling import hold_prefill
from .affinity import load_of, whole_load_of
from .health import SPECULATOR, PoolCounts
from .serve_calls import call_alone

logger = logging.getLogger(__name__)

Carried = dict[str, list[ray.ObjectRef]]  # lease id -> one object per rank; empty: gRPC carries

_RETRY_AFTER_S = 1.0
_SELF_TEST_S = 10.0  # to ask for its result
_GRACE_S = 0.5  # for a replica's answer that the time was used up


def by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """The same pool by actor calls, whose arguments and results may hold object references."""
    return handle.options(_by_reference=True)


@dataclass(frozen=True, slots=True)
class ServeSpeculator:
    """The speculator pool. `count` is asked whether it has any replica, where none answers."""

    handle: DeploymentHandle
    count: PoolCounts | None = None

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See `ports.Speculator`."""
        with mapped_errors("speculator", SpeculatorUnavailable, broken=SpeculatorUnavailable):
            payload = wire.pack((request, plan, timeout_s))
            load = wire.pack(whole_load_of(request))
            # The replica's own word comes first: it knows what the time went into.
            try:
                reply = await _call(self.handle, "select", timeout_s + _GRACE_S, payload, load)
            except TimeoutError:
                if await self._is_empty():
                    raise SpeculatorUnavailable("no speculator replica runs") from None
                raise
        return wire.unpack(reply, Selection)

    async def self_test(self) -> float | None:
        """The share of generated facts that the draft keeps; None: not known."""
        with mapped_errors("speculator", SpeculatorUnavailable, broken=SpeculatorUnavailable):
            facts_kept: float | None = await _call(self.handle, "self_test", _SELF_TEST_S)
        return facts_kept

    async def _is_empty(self) -> bool:
        """Calls to a pool without replicas wait for one: nobody is slow, nobody is there."""
        return self.count is not None and (await self.count())[SPECULATOR] == 0


@dataclass(frozen=True, slots=True)
class ServePrefiller:
    """The prefill pool. Leases are kept straight at the worker that holds them.

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
        async with (
            _streamed(call, "prefill", PrefillUnavailable, timeout_s, payload, load) as items,
            aclosing(self._said(items)) as said,
            hold_prefill(said, self.leases) as one,
        ):
            yield one

    async def _said(self, items: AsyncGenerator[Any]) -> AsyncGenerator[Ticket | Prefilled]:
        """Perhaps a ticket, then the result. What Ray carries is kept until this is closed."""
        async with aclosing(items):
            async for payload, objects in items:
                early, prefilled = wire.unpack(payload, wire.PREFILL_STEP)
                if early is not None:
                    yield early
                elif prefilled is not None:
                    ticket = prefilled.ticket
                    lease_id = "" if ticket is None else ticket.lease_id
                    self.carried[lease_id] = objects
                    try:
                        yield prefilled
                    finally:
                        # In place: frames that wait for the garbage collector know the list.
                        self.carried.pop(lease_id, []).clear()


@dataclass(frozen=True, slots=True)
class ServeDecoder:
    """The decode pool. `carried` is the prefiller's."""

    handle: DeploymentHandle
    carried: Carried

    async def decode(
        self,
        request: Request,
        selection: Selection,
        ticket: Ticket | None,
        replay: Replay,
        timeout_s: float,
    ) -> AsyncGenerator[Decoded]:
        """See `ports.Decoder`."""
        payload = wire.pack((request, selection, ticket, replay, timeout_s))
        objects = [] if ticket is None else self.carried.get(ticket.lease_id, [])
        call = self.handle.options(method_name="decode", stream=True)
        decoding = _streamed(call, "decode", DecodeUnavailable, timeout_s, payload, objects)
        async with decoding as items:
            async for item in items:
                yield wire.unpack(item, Decoded)


@asynccontextmanager
async def _streamed(
    handle: DeploymentHandle,
    pool: str,
    unavailable: type[Unavailable],
    timeout_s: float,
    *messages: object,
) -> AsyncIterator[AsyncGenerator[Any]]:
    """What a replica streams, until `timeout_s` have passed. Leaving cancels the call."""
    with mapped_errors(pool, unavailable):
        stream = call_alone(handle, *messages)
    try:
        async with aclosing(_items(stream, pool, unavailable, timeout_s)) as items:
            yield items
    finally:
        stream.cancel()  # otherwise the replica works on for nobody


async def _items(
    stream: Any, pool: str, unavailable: type[Unavailable], timeout_s: float
) -> AsyncGenerator[Any]:
    deadline = asyncio.get_running_loop().time() + timeout_s
    while True:
        with mapped_errors(pool, unavailable):
            try:
                async with asyncio.timeout_at(deadline):
                    item = await anext(stream)
            except StopAsyncIteration:
                return
        yield item


@contextmanager
def mapped_errors(
    pool: str,
    unavailable: type[Unavailable],
    *,
    broken: type[SpecPrefillError] = SpecPrefillError,
) -> Iterator[None]:
    """What a call to a pool may raise, as errors of ours.

    An error that a replica raised as one of ours comes out as the same one. `unavailable` is
    for replicas that could not be reached, `broken` for a failure that nobody named: another
    replica would most likely fail in the same way.
    """
    try:
        yield
    except RayTaskError as error:  # first: it is also an instance of what it was caused by
        raise _cause(pool, error, broken) from None
    except BackPressureError as error:
        raise _overloaded(pool, error) from error
    except TimeoutError as error:
        raise DeadlineExceeded(f"timeout_s: used up waiting for the {pool} pool") from error
    except (RayError, RayServeException, grpc.RpcError) as error:
        logger.warning("pool=%s unavailable: %s", pool, type(error).__name__)
        raise unavailable(f"no {pool} replica answered; try again") from error
    except SpecPrefillError:
        raise
    except Exception as error:  # gRPC handles raise a replica's own exception, whatever it is
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


def _cause(pool: str, error: RayTaskError, broken: type[SpecPrefillError]) -> SpecPrefillError:
    """What went wrong in the replica, or in a replica that it called."""
    cause: BaseException = error.cause
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if isinstance(cause, SpecPrefillError):
        return cause
    if isinstance(cause, BackPressureError):
        return _overloaded(pool, cause)
    logger.error("pool=%s failed: %s", pool, error)  # holds the remote traceback
    return broken(f"a {pool} replica failed")


def _overloaded(pool: str, error: BackPressureError) -> Overloaded:
    retry_after_s = _RETRY_AFTER_S if error.retry_after_s is None else error.retry_after_s
    return Overloaded(f"the {pool} pool is full; try again later", retry_after_s)
