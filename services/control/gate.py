"""Admission control for the pipeline: a bounded queue that lowers keep rates before it sheds.

A request is *before its first token* while a speculator and a prefill engine work for it. Only as
many are admitted as keep the engines busy; the rest wait here, where their order can still be
chosen, and not in an engine's queue. The rules are in `admission` and `fair_queue`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from itertools import islice
from math import exp, inf

from ..core.errors import DeadlineExceeded, Overloaded
from ..core.types import Plan, Reason
from .admission import (
    MIN_RETRY_AFTER_S,
    AdmissionPolicy,
    Backlog,
    Shed,
    ShedReason,
    judge,
)
from .decoding import Decoding
from .fair_queue import FairQueue
from .gateway_share import GatewayShare
from .request_summary import RequestSummary
from .stages import StageCurves

_NEWEST = 0.3  # weight of the newest wait behind other gateways' requests
_SWEPT_FROM = 64  # requests in the queue that may have left it
_MESSAGES = {
    ShedReason.QUEUE_FULL: "the service's queue is full",
    ShedReason.KEY_QUEUE_FULL: "too many requests of this API key are waiting",
    ShedReason.DEADLINE: "the request would miss its deadline (timeout_s)",
}


@dataclass(eq=False, slots=True)
class GatedRequest:
    """One request, from its admission to its first token."""

    arrival: RequestSummary
    plan: Plan
    speculate_s: float
    prefill_s: float
    late: bool
    arrived_s: float
    started_s: float | None = None  # None: it waits
    computed_from_s: float | None = None  # None: its prefill waits for those before it
    foreseen_s: float = 0.0  # from its slot to its first token, behind this gateway's own requests
    too_late: bool = False  # a slot came free when its time no longer sufficed
    waited_s: float = 0.0
    key: str | None = None
    left: bool = False
    turn: asyncio.Event = field(default_factory=asyncio.Event)

    def remaining_s(self, now_s: float, speed: float) -> float:
        """Return the prefill work left in server-seconds, of which `speed` are done per second."""
        if self.computed_from_s is None:
            return self.prefill_s
        done_s = max(0.0, now_s - self.computed_from_s) * speed
        return max(0.0, self.prefill_s - done_s)

    def is_hopeless(self, now_s: float) -> bool:
        """Return True if its first token would come too late even if it started at once."""
        own_s = self.speculate_s + self.prefill_s
        return now_s - self.arrived_s + own_s > self.arrival.timeout_s

    def unread_s(self, now_s: float) -> float:
        """Return the speculation work left, in server-seconds."""
        elapsed_s = 0.0 if self.started_s is None else now_s - self.started_s
        return max(0.0, self.speculate_s - elapsed_s)


@dataclass(frozen=True, slots=True)
class GateSlot:
    """The place of one request in a gate, which it holds until its first token."""

    gate: Gate
    admitted: GatedRequest

    @property
    def plan(self) -> Plan:
        """The plan to serve the request with."""
        return self.admitted.plan

    @property
    def waited_s(self) -> float:
        """The seconds that the request waited for the slot."""
        return self.admitted.waited_s

    def record_first_token(self, *, by_itself: bool = False) -> None:
        """Release the slot at the first token. Idempotent. `by_itself`: see `Chunk`."""
        self.gate.record_first_token(self.admitted, by_itself=by_itself)

    def release(self) -> None:
        """Note the request's end, with or without a first token. Idempotent."""
        self.gate.release(self.admitted)


class Gate:
    """Decides which requests run, in which order, with which plan. Knows time from `now` alone."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        *,
        per_engine: int,
        fair_keys: bool,
        curves: Callable[[], StageCurves],
        engines: Callable[[], GatewayShare],
        now: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._per_engine = per_engine
        self._fair_keys = fair_keys
        self._curves = curves
        self._engines = engines
        self._now = now
        self._queue: FairQueue[GatedRequest] = FairQueue()
        self._waiting: dict[int, GatedRequest] = {}
        self._running: dict[int, GatedRequest] = {}
        self._by_key: Counter[str] = Counter()
        self._paused_until_s = -inf
        self._decoding = Decoding(now)
        self._others = (0.0, 0.0)  # wait behind other gateways in seconds, and when it was measured

    @property
    def waiting(self) -> int:
        """The number of requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """The number of admitted requests without a first token."""
        return len(self._running)

    @property
    def is_shared(self) -> bool:
        """False: it decides for one gateway. See SharedAdmission."""
        return False

    async def enter(self, arrival: RequestSummary) -> GateSlot:
        """Wait in the queue for a slot. Raises Overloaded with a reason, or DeadlineExceeded."""
        admitted = self._admit(arrival)
        self._enqueue(admitted)
        try:
            await self._wait_for_turn(admitted)
        except BaseException:
            self.release(admitted)
            raise
        return GateSlot(self, admitted)

    def record_first_token(self, admitted: GatedRequest, *, by_itself: bool = False) -> None:
        """Release the slot at the first token; learn the wait behind other gateways.

        One that came late by itself shows nothing of them. Idempotent.
        """
        if admitted.left:
            return
        if not by_itself and admitted.started_s is not None:
            now_s = self._now()
            excess_s = max(0.0, now_s - admitted.started_s - admitted.foreseen_s)
            known_s = self._wait_behind_others_s(now_s)
            self._others = (known_s + _NEWEST * (excess_s - known_s), now_s)
        self._leave(admitted)
        self._decoding.begin(id(admitted), admitted.arrival.samples, self._engines().decode_share)

    def _unfinished_s(self, requests: Iterable[GatedRequest], now_s: float) -> float:
        """Return the seconds that this gateway's part of the prefill engines needs for these."""
        engines = self._engines()
        unfinished_s = sum(each.remaining_s(now_s, engines.prefill_speed) for each in requests)
        return unfinished_s / engines.prefill_share

    def _wait_behind_others_s(self, now_s: float) -> float:
        """Return the wait behind other gateways' requests; it decays within about one SLO."""
        wait_s, known_at_s = self._others
        return wait_s * exp((known_at_s - now_s) / self._policy.ttft_s)

    def release(self, admitted: GatedRequest) -> None:
        """Note a request's end, with or without a first token. Idempotent."""
        self._decoding.end(id(admitted))
        if not admitted.left:
            self._leave(admitted)

    def _leave(self, admitted: GatedRequest) -> None:
        """Release the slot: the first token is there, or never will be."""
        admitted.left = True
        self._forget_waiting(admitted)
        if self._running.pop(id(admitted), None) is not None:
            self._pause_slot(admitted)
        if len(self._queue) > 2 * len(self._waiting) + _SWEPT_FROM:
            self._queue.sweep(lambda each: not each.left)
        self._advance()

    def backlog(self, key: str | None = None) -> Backlog:
        """Return the work in front of a request that arrives now."""
        now_s, engines = self._now(), self._engines()
        held = list(self._running.values())
        in_time = held + [each for each in self._waiting.values() if not each.late]
        late = [each for each in self._waiting.values() if each.late]
        prefill_s = self._unfinished_s(in_time, now_s) + self._wait_behind_others_s(now_s)
        late_s = sum(each.prefill_s for each in late) / engines.prefill_share
        unread_s = sum(each.unread_s(now_s) for each in in_time)
        return Backlog(
            speculate_s=unread_s / engines.speculator_share,
            prefill_s=prefill_s,
            late_s=prefill_s + late_s,
            decode_s=self._decoding.wait_s(engines.decode_share),
            waiting=len(self._waiting) - len(late),
            waiting_late=len(late),
            waiting_of_key=0 if key is None else self._by_key[key],
        )

    def _admit(self, arrival: RequestSummary) -> GatedRequest:
        curves, ask = self._curves(), arrival.admission_request()
        key = arrival.key if self._fair_keys else None
        policy = self._policy.per_gateway(self._engines().gateways)
        verdict = judge(ask, self.backlog(key), curves, policy)
        if isinstance(verdict, Shed):
            message = f"{_MESSAGES[verdict.reason]}; try again later"
            raise Overloaded(message, verdict.retry_after_s, verdict.reason)
        plan = arrival.plan
        return GatedRequest(
            arrival,
            plan if verdict.keep >= ask.keep else _with_keep(plan, verdict.keep),
            ask.speculate_s(curves.speculate),
            verdict.prefill_s if arrival.is_prefilled else 0.0,
            verdict.late,
            self._now(),
            key=key,
        )

    def _enqueue(self, admitted: GatedRequest) -> None:
        self._waiting[id(admitted)] = admitted
        if admitted.key is not None:
            self._by_key[admitted.key] += 1
        work_s, priority = admitted.speculate_s + admitted.prefill_s, admitted.arrival.priority
        if self._fair_keys:  # a client may give way to the others, not pass them all
            priority = max(0, priority)
        self._queue.push(admitted, work_s, key=admitted.key, priority=priority, late=admitted.late)
        self._advance()

    async def _wait_for_turn(self, admitted: GatedRequest) -> None:
        try:
            async with asyncio.timeout(admitted.arrival.timeout_s):
                await admitted.turn.wait()
        except TimeoutError as error:
            raise DeadlineExceeded(
                "timeout_s: the request timed out in the admission queue"
            ) from error
        if admitted.too_late:
            retry_after_s = max(MIN_RETRY_AFTER_S, self.backlog().late_s)
            message = f"{_MESSAGES[ShedReason.DEADLINE]}; try again later"
            raise Overloaded(message, retry_after_s, ShedReason.DEADLINE)
        admitted.waited_s = self._now() - admitted.arrived_s

    def _advance(self) -> None:
        self._admit_waiting()
        self._note_computed()

    def _admit_waiting(self) -> None:
        """Start the next requests; one that can no longer be in time gets no slot."""
        most = max(1, int(self._engines().slots(self._per_engine)))
        while self._waiting and len(self._running) < most and self._now() >= self._paused_until_s:
            admitted = self._queue.pop()
            if admitted.left:
                continue
            self._forget_waiting(admitted)
            admitted.too_late = admitted.is_hopeless(self._now())
            if not admitted.too_late:
                self._start_running(admitted)
            admitted.turn.set()

    def _start_running(self, admitted: GatedRequest) -> None:
        now_s, engines = self._now(), self._engines()
        ahead_s = 0.0
        if len(self._running) >= engines.prefills_at_once:
            ahead_s = self._unfinished_s(self._running.values(), now_s)
        admitted.foreseen_s = max(admitted.speculate_s, ahead_s) + admitted.prefill_s
        admitted.started_s = now_s
        self._running[id(admitted)] = admitted

    def _pause_slot(self, admitted: GatedRequest) -> None:
        """Pause the slot after use: with a share below one, for the rest of the time."""
        slots, now_s = self._engines().slots(self._per_engine), self._now()
        if slots >= 1.0 or admitted.started_s is None:
            return
        rest_s = (now_s - admitted.started_s) * (1.0 / slots - 1.0)
        self._paused_until_s = now_s + rest_s
        asyncio.get_running_loop().call_later(rest_s, self._advance)

    def _note_computed(self) -> None:
        """Note which prompts prefill engines compute: they take them in the order of admission."""
        now_s = self._now()
        for admitted in islice(self._running.values(), self._engines().prefills_at_once):
            if admitted.computed_from_s is None and admitted.started_s is not None:
                read_s = max(now_s, admitted.started_s + admitted.speculate_s)
                admitted.computed_from_s = read_s + self._wait_behind_others_s(now_s)

    def _forget_waiting(self, admitted: GatedRequest) -> None:
        if self._waiting.pop(id(admitted), None) is None or admitted.key is None:
            return
        self._by_key[admitted.key] -= 1
        if self._by_key[admitted.key] == 0:
            del self._by_key[admitted.key]


def _with_keep(plan: Plan, keep: float) -> Plan:
    """Return the plan with a lower keep rate, or a lower ceiling if the scores choose."""
    if plan.within is not None:
        ceiling = max(keep, plan.within.floor)
        return replace(plan, within=replace(plan.within, ceiling=ceiling), lowered=True)
    return replace(plan, keep=keep, reason=Reason.LOAD, lowered=True)
