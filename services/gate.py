"""The door in front of the pipeline: a bounded queue that bends keep rates before it sheds.

A request is *before its first token* while a speculator and a prefill engine work for it. Only so
many are let in as keep the engines busy; the rest wait here, where their order can still be
chosen, and not in an engine's queue. The rules are `scaling.admission` and `scaling.fair_queue`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace

from .errors import DeadlineExceeded, Overloaded
from .pipeline import Pipeline
from .plan import Planner
from .scaling.admission import (
    MIN_RETRY_AFTER_S,
    AdmissionPolicy,
    Ask,
    Backlog,
    Shed,
    ShedReason,
    judge,
)
from .scaling.fair_queue import FairQueue
from .stages import StageCurves
from .types import Chunk, Plan, PlanKind, Reason, Request, Selection

_BELOW_DENSE = 0.999  # the highest keep rate of a plan whose rate the scores choose
_SWEPT_FROM = 64  # requests in the queue that may have left it
_MESSAGES = {
    ShedReason.QUEUE_FULL: "the service's queue is full",
    ShedReason.KEY_QUEUE_FULL: "too many requests of this API key are waiting",
    ShedReason.DEADLINE: "the first token would come after the request's time is used up",
}


@dataclass(frozen=True, slots=True)
class Engines:
    """How many replicas serve, as far as is known."""

    speculators: int = 1
    prefills: int = 1


@dataclass(eq=False, slots=True)
class Place:
    """One request, from its admission to its first token."""

    request: Request
    plan: Plan
    speculate_s: float
    prefill_s: float
    late: bool
    came_s: float
    began_s: float | None = None  # None: it waits
    too_late: bool = False  # its turn came when its time no longer sufficed
    waited_s: float = 0.0
    key: str | None = None
    left: bool = False
    turn: asyncio.Event = field(default_factory=asyncio.Event)

    def remaining_s(self, now_s: float) -> float:
        """Of its prefill, in server-seconds."""
        if self.began_s is None:
            return self.prefill_s
        into_prefill_s = now_s - self.began_s - self.speculate_s
        return min(self.prefill_s, max(0.0, self.prefill_s - into_prefill_s))

    def is_hopeless(self, now_s: float) -> bool:
        """Whether its first token would come too late even if it went on at once."""
        own_s = self.speculate_s + self.prefill_s
        return now_s - self.came_s + own_s > self.request.timeout_s

    def unread_s(self, now_s: float) -> float:
        """Of its speculation."""
        elapsed_s = 0.0 if self.began_s is None else now_s - self.began_s
        return max(0.0, self.speculate_s - elapsed_s)


class Gate:
    """Who may go on, in which order, and with which plan. Knows time from `now` alone."""

    def __init__(
        self,
        policy: AdmissionPolicy,
        *,
        keep_floor: float,
        per_engine: int,
        fair_keys: bool,
        curves: Callable[[], StageCurves],
        engines: Callable[[], Engines],
        now: Callable[[], float],
    ) -> None:
        self._policy = policy
        self._keep_floor = keep_floor
        self._per_engine = per_engine
        self._fair_keys = fair_keys
        self._curves = curves
        self._engines = engines
        self._now = now
        self._queue: FairQueue[Place] = FairQueue()
        self._waiting: dict[int, Place] = {}
        self._running: dict[int, Place] = {}
        self._by_key: Counter[str] = Counter()

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Requests that were let in and have no first token yet."""
        return len(self._running)

    @asynccontextmanager
    async def place(self, request: Request, plan: Plan) -> AsyncIterator[Place]:
        """Wait for a turn, and hold a place until `done` or the exit.

        Raises Overloaded with a reason, or DeadlineExceeded.
        """
        place = self._admit(request, plan)
        self._enter(place)
        try:
            await self._turn(place)
            yield place
        finally:
            self.done(place)

    def done(self, place: Place) -> None:
        """Its first token is there, or never will be: the next may go on. Idempotent."""
        if place.left:
            return
        place.left = True
        self._forget_waiting(place)
        self._running.pop(id(place), None)
        if len(self._queue) > 2 * len(self._waiting) + _SWEPT_FROM:
            self._queue.sweep(lambda each: not each.left)
        self._let_in()

    def backlog(self, key: str | None = None) -> Backlog:
        """What a request that came now would wait for."""
        now_s, engines = self._now(), self._engines()
        prefills = max(1, engines.prefills)
        held = list(self._running.values())
        in_time = held + [each for each in self._waiting.values() if not each.late]
        late = [each for each in self._waiting.values() if each.late]
        prefill_s = sum(each.remaining_s(now_s) for each in in_time) / prefills
        late_s = sum(each.prefill_s for each in late) / prefills
        unread_s = sum(each.unread_s(now_s) for each in in_time)
        return Backlog(
            speculate_s=unread_s / max(1, engines.speculators),
            prefill_s=prefill_s,
            late_s=prefill_s + late_s,
            waiting=len(self._waiting) - len(late),
            waiting_late=len(late),
            waiting_of_key=0 if key is None else self._by_key[key],
        )

    def _admit(self, request: Request, plan: Plan) -> Place:
        curves, tokens = self._curves(), len(request.prompt)
        ask = self._ask(request, plan)
        key = request.key if self._fair_keys else None
        verdict = judge(ask, self.backlog(key), curves, self._policy)
        if isinstance(verdict, Shed):
            message = f"{_MESSAGES[verdict.reason]}; try again later"
            raise Overloaded(message, verdict.retry_after_s, verdict.reason)
        speculate_s = 0.0 if plan.kind is PlanKind.DENSE else curves.speculate.seconds(tokens)
        bent = plan if verdict.keep >= ask.keep else _bent(plan, verdict.keep)
        return Place(
            request, bent, speculate_s, verdict.prefill_s, verdict.late, self._now(), key=key
        )

    def _ask(self, request: Request, plan: Plan) -> Ask:
        tokens = len(request.prompt)
        if plan.kind is PlanKind.DENSE:
            return Ask(tokens, 1.0, 1.0, request.timeout_s)
        keep = min(plan.keep, _BELOW_DENSE)
        return Ask(tokens, keep, min(keep, self._floor(request, plan)), request.timeout_s)

    def _floor(self, request: Request, plan: Plan) -> float:
        """The caller's floor; a rate that was asked for is one, too."""
        controls = request.controls
        if controls.floor is not None:
            return controls.floor
        if plan.floor is not None:
            return plan.floor
        return self._keep_floor if controls.keep is None else controls.keep

    def _enter(self, place: Place) -> None:
        self._waiting[id(place)] = place
        if place.key is not None:
            self._by_key[place.key] += 1
        work_s, priority = place.speculate_s + place.prefill_s, place.request.priority
        self._queue.push(place, work_s, key=place.key, priority=priority, late=place.late)
        self._let_in()

    async def _turn(self, place: Place) -> None:
        try:
            async with asyncio.timeout(place.request.timeout_s):
                await place.turn.wait()
        except TimeoutError as error:
            raise DeadlineExceeded("timeout_s: used up waiting for a turn") from error
        if place.too_late:
            retry_after_s = max(MIN_RETRY_AFTER_S, self.backlog().late_s)
            message = f"{_MESSAGES[ShedReason.DEADLINE]}; try again later"
            raise Overloaded(message, retry_after_s, ShedReason.DEADLINE)
        place.waited_s = self._now() - place.came_s

    def _let_in(self) -> None:
        """Those whose turn it is; one that can no longer be in time takes no engine from others."""
        engines = self._engines()
        most = self._per_engine * max(1, engines.speculators + engines.prefills)
        while self._waiting and len(self._running) < most:
            place = self._queue.pop()
            if place.left:
                continue
            self._forget_waiting(place)
            place.too_late = place.is_hopeless(self._now())
            if not place.too_late:
                place.began_s = self._now()
                self._running[id(place)] = place
            place.turn.set()

    def _forget_waiting(self, place: Place) -> None:
        if self._waiting.pop(id(place), None) is None or place.key is None:
            return
        self._by_key[place.key] -= 1
        if self._by_key[place.key] == 0:
            del self._by_key[place.key]


class AdmittingPipeline:
    """A pipeline behind a gate. What it waits for counts in the report."""

    def __init__(self, pipeline: Pipeline, gate: Gate) -> None:
        self._pipeline = pipeline
        self._gate = gate
        self.planner: Planner = pipeline.planner

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See Pipeline.generate. Raises Overloaded at once, when the request is shed."""
        plan = self.planner.plan(request) if request.plan is None else request.plan
        async with self._gate.place(request, plan) as place:
            left_s = max(0.0, request.timeout_s - place.waited_s)
            admitted = replace(request, plan=place.plan, timeout_s=left_s)
            async with aclosing(self._pipeline.generate(admitted)) as chunks:  # type: ignore[type-var]
                async for chunk in chunks:
                    self._gate.done(place)
                    yield _told(chunk, place.waited_s)

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self._pipeline.select(request)


def _bent(plan: Plan, keep: float) -> Plan:
    """The plan with a lower keep rate; where the scores choose, with a lower highest one."""
    if plan.floor is not None:
        return replace(plan, keep=max(keep, plan.floor))
    return replace(plan, keep=keep, reason=Reason.LOAD)


def _told(chunk: Chunk, waited_s: float) -> Chunk:
    report = chunk.report
    if report is None or waited_s == 0.0:
        return chunk
    waited = replace(report, queue_s=report.queue_s + waited_s, ttft_s=report.ttft_s + waited_s)
    return replace(chunk, report=waited)
