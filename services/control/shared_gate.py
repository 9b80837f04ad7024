"""One gate for all gateways, for the process that serves it.

Gateways that decide by themselves can only divide the pools; where engines are few, a gateway's
part is a fraction of one, and none knows when its turn comes. Here one gate sees every request.
Pure: the transport is the caller's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

from ..core.errors import DeadlineExceeded, Overloaded
from ..core.types import Plan
from .admission import AdmissionPolicy
from .gate import Gate, GateSlot
from .gateway_share import GatewayShare
from .request_summary import RequestSummary
from .stages import DEFAULT_CURVES, StageCurves

SILENT_S = 5.0  # a gateway that sends nothing for this long has gone, and its slots with it

SlotId = tuple[str, int]  # the gateway, and its own number for the request


@dataclass(frozen=True, slots=True)
class View:
    """What a gateway knows of the pools."""

    curves: StageCurves
    engines: GatewayShare


@dataclass(frozen=True, slots=True)
class OpenRequests:
    """The requests of a gateway that have not ended, by its own numbers for them.

    A request's messages may be lost on the way: these numbers settle what its gate missed.
    """

    next_number: int = 0  # requests from this one on are not known here
    without_token: tuple[int, ...] = ()  # they wait, or run
    with_token: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class GateEntry:
    """A gateway's request for a slot."""

    gateway: str
    number: int
    arrival: RequestSummary
    view: View


@dataclass(frozen=True, slots=True)
class Admission:
    """The answer: a slot with its plan, or the reason why there is none."""

    plan: Plan | None = None
    waited_s: float = 0.0
    message: str = ""
    reason: str | None = None  # None without a plan: the request's time was used up
    retry_after_s: float = 0.0
    is_forgotten: bool = False  # no message of the gateway came for long: it may ask again

    def accepted_plan(self) -> Plan:
        """Return the plan. Raises Overloaded or DeadlineExceeded where there is no slot."""
        if self.plan is not None:
            return self.plan
        if self.reason is None:
            raise DeadlineExceeded(self.message)
        raise Overloaded(self.message, self.retry_after_s, self.reason)


class SharedGate:
    """Gives out slots by gateway and number. Not thread-safe: one event loop."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        *,
        per_engine: int,
        fair_keys: bool,
        now: Callable[[], float],
    ) -> None:
        self._view = View(DEFAULT_CURVES, GatewayShare())
        self._now = now
        self._gate = Gate(
            policy,
            per_engine=per_engine,
            fair_keys=fair_keys,
            curves=lambda: self._view.curves,
            engines=lambda: self._view.engines,
            now=now,
        )
        self._heard_s: dict[str, float] = {}
        self._entering: dict[SlotId, asyncio.Task[GateSlot]] = {}
        self._held: dict[SlotId, GateSlot] = {}

    @property
    def gate(self) -> Gate:
        """The gate behind."""
        return self._gate

    async def enter(self, entry: GateEntry) -> Admission:
        """Wait for a slot; `leave` gives it back, also while this waits."""
        self._take_view(entry.gateway, entry.view)
        slot_id = (entry.gateway, entry.number)
        task = asyncio.create_task(self._gate.enter(entry.arrival))
        self._entering[slot_id] = task
        try:
            await asyncio.wait([task])
        finally:
            has_left = self._entering.pop(slot_id, None) is None
            task.cancel()
        if has_left:
            if not task.cancelled() and task.exception() is None:
                task.result().release()
            return Admission(is_forgotten=True)
        return self._answer(slot_id, task)

    def leave(
        self, gateway: str, number: int, *, first_token: bool, by_itself: bool = False
    ) -> None:
        """Give a slot back at the first token, or note the request's end. Idempotent."""
        slot_id = (gateway, number)
        if first_token and slot_id in self._held:
            self._held[slot_id].record_first_token(by_itself=by_itself)
            return
        entering = self._entering.pop(slot_id, None)
        if entering is not None:
            entering.cancel()
        slot = self._held.pop(slot_id, None)
        if slot is not None:
            slot.release()

    def renew(self, gateway: str, view: View, requests: OpenRequests) -> None:
        """Take a gateway's newest view of the pools, and release the slots that have no request.

        So are those of gateways that were silent for long.
        """
        self._take_view(gateway, view)
        self._settle(gateway, requests)

    def _take_view(self, gateway: str, view: View) -> None:
        now_s = self._now()
        self._heard_s[gateway] = now_s
        self._view = replace(view, engines=replace(view.engines, gateways=1))
        for name, heard_s in list(self._heard_s.items()):
            if now_s - heard_s > SILENT_S:
                self._forget(name)

    def _settle(self, gateway: str, requests: OpenRequests) -> None:
        """Make up for lost messages: numbers only rise, and a first token stays."""
        without_token, with_token = set(requests.without_token), set(requests.with_token)
        for slot_id in [*self._entering, *self._held]:
            name, number = slot_id
            if name != gateway or number >= requests.next_number or number in without_token:
                continue
            # A first token that is only known from here came at an unknown time.
            self.leave(name, number, first_token=number in with_token, by_itself=True)

    def _answer(self, slot_id: SlotId, task: asyncio.Task[GateSlot]) -> Admission:
        try:
            slot = task.result()
        except Overloaded as error:
            return Admission(
                message=str(error), reason=error.reason, retry_after_s=error.retry_after_s
            )
        except DeadlineExceeded as error:
            return Admission(message=str(error))
        self._held[slot_id] = slot
        return Admission(slot.plan, slot.waited_s)

    def _forget(self, gateway: str) -> None:
        del self._heard_s[gateway]
        for slot_id in [*self._entering, *self._held]:
            if slot_id[0] == gateway:
                self.leave(*slot_id, first_token=False)
