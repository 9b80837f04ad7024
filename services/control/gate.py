"""The door in front of the pipeline: a bounded queue that bends keep rates before it sheds.

A request is *before its first token* while a speculator and a prefill engine work for it. Only so
many are let in as keep the engines busy; the rest wait here, where their order can still be
chosen, and not in an engine's queue. The rules are `scaling.admission` and `scaling.fair_queue`.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from math import ceil, exp, inf

from ..core.errors import DeadlineExceeded, Overloaded
from ..core.pipeline import Pipeline
from ..core.plan import plan_of
from ..core.types import Chunk, Plan, PlanKind, Reason, Request, Selection
from .admission import (
    MIN_RETRY_AFTER_S,
    AdmissionPolicy,
    Ask,
    Backlog,
    Shed,
    ShedReason,
    judge,
)
from .fair_queue import FairQueue
from .stages import StageCurves

_BELOW_DENSE = 0.999  # the highest keep rate of a plan whose rate the scores choose
_NEWEST = 0.3  # weight of the newest wait behind other gateways' requests
_SWEPT_FROM = 64  # requests in the queue that may have left it
_MESSAGES = {
    ShedReason.QUEUE_FULL: "the service's queue is full",
    ShedReason.KEY_QUEUE_FULL: "too many requests of this API key are waiting",
    ShedReason.DEADLINE: "the first token would come after the request's time is used up",
}


@dataclass(frozen=True, slots=True)
class Engines:
    """How many replicas serve, as far as is known, and how many gateways share them.

    Gateways do not talk to each other. Each takes an equal part of what the pools can do: a
    fraction of an engine where there are more gateways than engines.
    """

    speculators: int = 1
    prefills: int = 1
    gateways: int = 1

    @property
    def speculator_share(self) -> float:
        """This gateway's part of the speculators, in replicas."""
        return max(1, self.speculators) / max(1, self.gateways)

    @property
    def prefill_share(self) -> float:
        """This gateway's part of the prefill engines, in replicas."""
        return max(1, self.prefills) / max(1, self.gateways)

    @property
    def prefill_speed(self) -> float:
        """Server-seconds a second that one prompt of this gateway gets, once it is computed.

        With less than one engine it is not known when this gateway's turn comes: 0, the prompt
        counts as a whole until it is answered.
        """
        share = self.prefill_share
        return 0.0 if share < 1.0 else share / ceil(share)

    @property
    def prefills_at_once(self) -> int:
        """How many prompts of this gateway the prefill engines compute at a time."""
        return ceil(self.prefill_share)

    def slots(self, per_engine: int) -> float:
        """This gateway's part of the requests that may be before their first token."""
        return per_engine * max(1, self.speculators + self.prefills) / max(1, self.gateways)


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
    computed_from_s: float | None = None  # None: its prefill waits for those before it
    foreseen_s: float = 0.0  # from its turn to its first token, behind this gateway's own requests
    too_late: bool = False  # its turn came when its time no longer sufficed
    waited_s: float = 0.0
    key: str | None = None
    left: bool = False
    turn: asyncio.Event = field(default_factory=asyncio.Event)

    def remaining_s(self, now_s: float, speed: float) -> float:
        """Of its prefill, in server-seconds, of which `speed` are done in a second."""
        if self.computed_from_s is None:
            return self.prefill_s
        done_s = max(0.0, now_s - self.computed_from_s) * speed
        return max(0.0, self.prefill_s - done_s)

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
        self._rests_until_s = -inf
        self._others = (0.0, 0.0)  # seconds that were waited behind others, and when

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

    def answered(self, place: Place) -> None:
        """Its first token is there: `done`, and what it waited for others is learnt."""
        if not place.left and place.began_s is not None:
            now_s = self._now()
            excess_s = max(0.0, now_s - place.began_s - place.foreseen_s)
            known_s = self._others_s(now_s)
            self._others = (known_s + _NEWEST * (excess_s - known_s), now_s)
        self.done(place)

    def _unfinished_s(self, places: Iterable[Place], now_s: float) -> float:
        """How long this gateway's part of the prefill engines takes for these."""
        engines = self._engines()
        unfinished_s = sum(each.remaining_s(now_s, engines.prefill_speed) for each in places)
        return unfinished_s / engines.prefill_share

    def _others_s(self, now_s: float) -> float:
        """Wait behind other gateways' requests; forgotten within about one SLO."""
        wait_s, known_at_s = self._others
        return wait_s * exp((known_at_s - now_s) / self._policy.ttft_s)

    def done(self, place: Place) -> None:
        """Its first token is there, or never will be: the next may go on. Idempotent."""
        if place.left:
            return
        place.left = True
        self._forget_waiting(place)
        if self._running.pop(id(place), None) is not None:
            self._rest(place)
        if len(self._queue) > 2 * len(self._waiting) + _SWEPT_FROM:
            self._queue.sweep(lambda each: not each.left)
        self._advance()

    def backlog(self, key: str | None = None) -> Backlog:
        """What a request that came now would wait for."""
        now_s, engines = self._now(), self._engines()
        held = list(self._running.values())
        in_time = held + [each for each in self._waiting.values() if not each.late]
        late = [each for each in self._waiting.values() if each.late]
        prefill_s = self._unfinished_s(in_time, now_s) + self._others_s(now_s)
        late_s = sum(each.prefill_s for each in late) / engines.prefill_share
        unread_s = sum(each.unread_s(now_s) for each in in_time)
        return Backlog(
            speculate_s=unread_s / engines.speculator_share,
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
        policy = self._policy.divided(self._engines().gateways)
        verdict = judge(ask, self.backlog(key), curves, policy)
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
        keep = min(plan.highest_keep, _BELOW_DENSE)
        return Ask(tokens, keep, min(keep, self._floor(request, plan)), request.timeout_s)

    def _floor(self, request: Request, plan: Plan) -> float:
        """The caller's floor; a rate that was asked for is one, too."""
        controls = request.controls
        if controls.floor is not None:
            return controls.floor
        if plan.within is not None:
            return plan.within.floor
        return self._keep_floor if controls.keep is None else controls.keep

    def _enter(self, place: Place) -> None:
        self._waiting[id(place)] = place
        if place.key is not None:
            self._by_key[place.key] += 1
        work_s, priority = place.speculate_s + place.prefill_s, place.request.priority
        self._queue.push(place, work_s, key=place.key, priority=priority, late=place.late)
        self._advance()

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

    def _advance(self) -> None:
        self._let_in()
        self._note_computed()

    def _let_in(self) -> None:
        """Those whose turn it is; one that can no longer be in time takes no engine from others."""
        most = max(1, int(self._engines().slots(self._per_engine)))
        while self._waiting and len(self._running) < most and self._now() >= self._rests_until_s:
            place = self._queue.pop()
            if place.left:
                continue
            self._forget_waiting(place)
            place.too_late = place.is_hopeless(self._now())
            if not place.too_late:
                self._start(place)
            place.turn.set()

    def _start(self, place: Place) -> None:
        now_s, engines = self._now(), self._engines()
        ahead_s = 0.0
        if len(self._running) >= engines.prefills_at_once:
            ahead_s = self._unfinished_s(self._running.values(), now_s)
        place.foreseen_s = max(place.speculate_s, ahead_s) + place.prefill_s
        place.began_s = now_s
        self._running[id(place)] = place

    def _rest(self, place: Place) -> None:
        """With less than one slot, hold it for its part of the time only."""
        slots, now_s = self._engines().slots(self._per_engine), self._now()
        if slots >= 1.0 or place.began_s is None:
            return
        rest_s = (now_s - place.began_s) * (1.0 / slots - 1.0)
        self._rests_until_s = now_s + rest_s
        asyncio.get_running_loop().call_later(rest_s, self._advance)

    def _note_computed(self) -> None:
        """Engines take prompts in the order in which they were let in."""
        now_s = self._now()
        for place in islice(self._running.values(), self._engines().prefills_at_once):
            if place.computed_from_s is None and place.began_s is not None:
                read_s = max(now_s, place.began_s + place.speculate_s)
                place.computed_from_s = read_s + self._others_s(now_s)

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

    async def generate(self, request: Request) -> AsyncGenerator[Chunk, None]:
        """See Pipeline.generate. Raises Overloaded at once, when the request is shed."""
        async with self._gate.place(request, plan_of(request)) as place:
            left_s = max(0.0, request.timeout_s - place.waited_s)
            admitted = replace(request, plan=place.plan, timeout_s=left_s)
            async with aclosing(self._pipeline.generate(admitted)) as chunks:
                async for chunk in chunks:
                    self._gate.answered(place)
                    yield _told(chunk, place.waited_s)

    async def select(self, request: Request) -> Selection:
        """See Pipeline.select."""
        return await self._pipeline.select(request)


def _bent(plan: Plan, keep: float) -> Plan:
    """The plan with a lower keep rate; where the scores choose, with a lower highest one."""
    if plan.within is not None:
        ceiling = max(keep, plan.within.floor)
        return replace(plan, within=replace(plan.within, ceiling=ceiling))
    return replace(plan, keep=keep, reason=Reason.LOAD)


def _told(chunk: Chunk, waited_s: float) -> Chunk:
    report = chunk.report
    if report is None or waited_s == 0.0:
        return chunk
    waited = replace(report, queue_s=report.queue_s + waited_s, ttft_s=report.ttft_s + waited_s)
    return replace(chunk, report=waited)
