"""A gateway's way to the gate that all gateways share, and what it does without it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

from ...control.admitting import AdmissionGate, Slot
from ...control.request_summary import RequestSummary
from ...control.shared_gate import Admission, GateEntry, OpenRequests, View
from ...core.errors import DeadlineExceeded
from ...core.types import Plan

logger = logging.getLogger(__name__)

RENEW_S = 1.0
PATIENCE_S = 3.0  # a gate that does not answer for this long is lost
_GRACE_S = 1.0  # beyond a request's own time, which the gate watches


class GateLost(Exception):
    """The shared gate does not answer: its process has ended, or is unreachable."""


class GateLink(Protocol):
    """The calls to the process that serves the shared gate. Each raises GateLost."""

    async def enter(self, entry: GateEntry) -> Admission:
        """See SharedGate.enter."""
        ...

    def leave(self, gateway: str, number: int, first_token: bool, by_itself: bool) -> None:
        """See SharedGate.leave; returns at once, and never raises."""
        ...

    async def renew(self, gateway: str, view: View, requests: OpenRequests) -> None:
        """See SharedGate.renew."""
        ...


Connect = Callable[[], Awaitable[GateLink]]


@dataclass(eq=False, slots=True)
class SharedSlot:
    """A slot of the shared gate."""

    plan: Plan
    waited_s: float
    _leave: Callable[[bool, bool], None]
    _has_token: bool = False
    _ended: bool = False

    def record_first_token(self, *, by_itself: bool = False) -> None:
        """Release the slot at the first token. Idempotent. `by_itself`: see `Chunk`."""
        if not self._has_token and not self._ended:
            self._has_token = True
            self._leave(True, by_itself)

    def release(self) -> None:
        """Note the request's end, with or without a first token. Idempotent."""
        if not self._ended:
            self._ended = True
            self._leave(False, False)


@dataclass(frozen=True, slots=True)
class LaterSlot:
    """A slot of another gate, for which a request waited in a lost one first."""

    slot: Slot
    waited_before_s: float

    @property
    def plan(self) -> Plan:
        """The plan to serve the request with."""
        return self.slot.plan

    @property
    def waited_s(self) -> float:
        """The seconds that the request waited in both gates."""
        return self.waited_before_s + self.slot.waited_s

    def record_first_token(self, *, by_itself: bool = False) -> None:
        """Release the slot at the first token. Idempotent. `by_itself`: see `Chunk`."""
        self.slot.record_first_token(by_itself=by_itself)

    def release(self) -> None:
        """Note the request's end, with or without a first token. Idempotent."""
        self.slot.release()


class SharedAdmission:
    """Asks the shared gate; while it is lost, decides by a gate of its own.

    Requests that waited in a lost gate wait again in the own one, with the time they have left.
    """

    def __init__(
        self,
        connect: Connect,
        own: AdmissionGate,
        gateway: str,
        view: Callable[[], View],
        now: Callable[[], float],
    ) -> None:
        self._connect = connect
        self._own = own
        self._gateway = gateway
        self._view = view
        self._now = now
        self._next_number = 0
        self._waiting: set[int] = set()  # numbers of requests in the shared gate
        self._running: set[int] = set()
        self._streaming: set[int] = set()  # with a first token
        self._link: GateLink | None = None
        self._lost: asyncio.Future[None] | None = None  # of this link
        self._task: asyncio.Task[None] | None = None

    @property
    def is_shared(self) -> bool:
        """True while the shared gate answers."""
        return self._link is not None

    @property
    def waiting(self) -> int:
        """The number of this gateway's requests that wait."""
        return len(self._waiting) + self._own.waiting

    @property
    def running(self) -> int:
        """The number of this gateway's admitted requests without a first token."""
        return len(self._running) + self._own.running

    def start(self) -> None:
        """Connect in the background, and again whenever the gate is lost."""
        self._task = asyncio.create_task(self._keep_connected())

    async def close(self) -> None:
        """Stop. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def enter(self, arrival: RequestSummary) -> Slot:
        """Wait for a slot. Raises Overloaded with a reason, or DeadlineExceeded."""
        link, lost = self._link, self._lost
        if link is None or lost is None:
            return await self._own.enter(arrival)
        arrived_s = self._now()
        entry = GateEntry(self._gateway, self._next_number, arrival, self._view())
        self._next_number += 1
        self._waiting.add(entry.number)
        try:
            admission = await self._ask(link, lost, entry)
        except GateLost:
            self._waiting.discard(entry.number)
            waited_s = self._now() - arrived_s
            left_s = max(0.0, arrival.timeout_s - waited_s)
            slot = await self._own.enter(replace(arrival, timeout_s=left_s))
            return LaterSlot(slot, waited_s)
        finally:
            self._waiting.discard(entry.number)
        plan = admission.accepted_plan()
        self._running.add(entry.number)
        waited_s = self._now() - arrived_s if admission.waited_s > 0.0 else 0.0
        return SharedSlot(plan, waited_s, partial(self._leave, link, entry.number))

    def _leave(self, link: GateLink, number: int, first_token: bool, by_itself: bool) -> None:
        self._running.discard(number)
        if first_token:
            self._streaming.add(number)
        else:
            self._streaming.discard(number)
        link.leave(self._gateway, number, first_token, by_itself)

    async def _ask(self, link: GateLink, lost: asyncio.Future[None], entry: GateEntry) -> Admission:
        """Ask for a slot; return it unless the gate is lost first. Raises GateLost."""
        asked = asyncio.ensure_future(link.enter(entry))
        patience_s = entry.arrival.timeout_s + _GRACE_S
        admission: Admission | None = None
        try:
            either: list[asyncio.Future[Any]] = [asked, lost]
            await asyncio.wait(either, timeout=patience_s, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                admission = asked.result()
        finally:
            if admission is None:  # perhaps it came as the caller left: its slot goes back
                asked.cancel()
                link.leave(self._gateway, entry.number, False, False)
        if admission is not None and not admission.is_forgotten:
            return admission
        if admission is not None or lost.done():
            raise GateLost
        raise DeadlineExceeded("timeout_s: the request timed out in the admission queue")

    async def _keep_connected(self) -> None:
        while True:
            try:
                async with asyncio.timeout(PATIENCE_S):
                    link = await self._connect()
                    await self._renew(link)
            except (GateLost, TimeoutError) as error:
                logger.info("the shared gate: not yet: %s", error)
                await asyncio.sleep(RENEW_S)
                continue
            self._lost = asyncio.get_running_loop().create_future()
            self._link = link
            logger.info("admission is decided by the gate that all gateways share")
            await self._renew_until_lost(link)
            self._link = None
            self._lost.set_result(None)

    async def _renew(self, link: GateLink) -> None:
        without_token = (*self._waiting, *self._running)
        requests = OpenRequests(self._next_number, without_token, tuple(self._streaming))
        await link.renew(self._gateway, self._view(), requests)

    async def _renew_until_lost(self, link: GateLink) -> None:
        while True:
            await asyncio.sleep(RENEW_S)
            try:
                async with asyncio.timeout(PATIENCE_S):
                    await self._renew(link)
            except (GateLost, TimeoutError) as error:
                logger.warning(
                    "the shared gate is lost (%s): this gateway decides by its own part of the "
                    "pools until there is another",
                    str(error) or "no answer",
                )
                return
