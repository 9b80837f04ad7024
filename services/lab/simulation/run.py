"""The event loop: takes a trace, a world and a controller; returns each request's result.

Requests queue for the first free engine of each pool, as if the router knew every queue. A prompt
is pruned by a speculator and then prefilled, or is prefilled dense; its first token leaves the
prefill engine; then it takes a slot of the decode pool until it is answered. All of them may share
one machine, and prompts the steps of an engine, where the world requires it.
"""

from __future__ import annotations

from dataclasses import replace
from heapq import heapify, heappop, heappush

import numpy as np

from ...control.admission import AdmissionPolicy, AdmissionRequest, Backlog, Shed, judge
from ...control.decoding import Decoding
from ...control.scaling.sizing import stage_times
from ...control.scaling.values import Arrivals, Observation, Pool, PoolState
from .events import END_OF_WORK, Event, EventKind
from .machine import Cores
from .records import POOLS, Records
from .stage import SimulatedStage
from .station import Station
from .steps import StepLimits
from .trace import Trace
from .world import Controller, SimulationResult, Telemetry, World

LOOK_BACK_S = 600.0  # of the arrivals that controllers see
LEAST_CORES = 0.1  # of a machine, whatever others take of it


def simulate(
    trace: Trace,
    world: World,
    controller: Controller,
    initial: dict[Pool, int],
    admission: AdmissionPolicy | None = None,
) -> SimulationResult:
    """Run the whole trace. Without `admission` every request waits, at its full keep rate."""
    return _Simulation(trace, world, controller, initial, admission).run()


class _Simulation:
    """The state of one simulation."""

    def __init__(
        self,
        trace: Trace,
        world: World,
        controller: Controller,
        initial: dict[Pool, int],
        admission: AdmissionPolicy | None,
    ) -> None:
        self.trace = trace
        self.world = world
        self.controller = controller
        self.admission = admission
        self.arrivals = trace.arrivals(world.keep, world.min_prompt_tokens)
        times = stage_times(self.arrivals, world.engines)
        self.time_s: list[float] = trace.time_s.tolist()
        self.prompt: list[float] = trace.prompt_tokens.tolist()
        self.speculate_s: list[float] = times.speculate_s.tolist()
        self.prefill_s: list[float] = times.prefill_s.tolist()
        self.decode_s: list[float] = times.decode_s.tolist()
        self.speculators = Station(initial[Pool.SPECULATOR], 1, self.speculate_s)
        self.prefills = Station(initial[Pool.PREFILL], 1, self.prefill_s)
        slots = world.engines.decode_slots
        self.decodes = Station(initial[Pool.DECODE], slots, self.decode_s)
        self.stations = (self.speculators, self.prefills, self.decodes)  # as in POOLS
        self.now_s = 0.0
        self.decoding = Decoding(lambda: self.now_s)
        self.kept: list[float] = self.arrivals.kept_tokens.tolist()
        curves = world.engines.curves
        self.speculation = SimulatedStage(
            EventKind.SPECULATED, self.speculators, curves.speculate, world.passes,
            self._reading, self._waits,
        )  # fmt: skip
        self.prefilling = SimulatedStage(
            EventKind.PREFILLED, self.prefills, curves.prefill, world.steps,
            self._prefilling, self._waits,
        )  # fmt: skip
        self.stages = (self.speculation, self.prefilling)
        self.cores = None
        if world.machine is not None:  # a decode engine's sequences are one thread's work
            self.cores = Cores(
                world.machine, {EventKind.DECODED: lambda: max(1, self.decodes.ready)}
            )
        count = len(trace)
        self.records = Records(count)
        nominal = np.full(count, world.keep)
        if trace.kept_tokens is not None:
            nominal = trace.kept_tokens / trace.prompt_tokens
        self.keep = np.where(times.speculate_s > 0, nominal, 1.0).tolist()
        self.late = [False] * count
        self.entering = 0  # requests at the front
        self.events: list[Event] = []
        self.serial = 0
        self.seen = 0  # requests that had arrived at the last tick

    def run(self) -> SimulationResult:
        """Process arrivals and events in order of time, until the last answer."""
        self._schedule()
        events, times, arrived = self.events, self.time_s, 0
        count, now_s = len(times), 0.0
        while arrived < count or self._has_open_requests():
            next_s = events[0][0] if self.cores is None else min(events[0][0], self.cores.due_s())
            if arrived < count and times[arrived] <= next_s:
                now_s = self.now_s = times[arrived]
                self._arrive(arrived, now_s)
                arrived += 1
                continue
            if self.cores is not None and self.cores.due_s() <= events[0][0]:
                now_s, (ended, subject, run) = self.cores.end()
                self.now_s = now_s
                self._process_event(EventKind(ended), subject, run, now_s)
                continue
            now_s, _, kind, subject, run = heappop(events)
            self.now_s = now_s
            if kind is EventKind.TICK:
                self._tick(now_s, arrived)
            else:
                self._process_event(kind, subject, run, now_s)
        core_s = 0.0 if self.cores is None else self.cores.used_s
        return self.records.outcome(now_s, self.stations, self.keep, core_s)

    def _schedule(self) -> None:
        """Schedule the failures, and the first tick."""
        for failure in self.world.failures:
            self._push(
                failure.time_s, EventKind.FAILURE, POOLS.index(failure.pool), failure.replicas
            )
        for place, (time_s, _) in enumerate(self.world.others):
            self._push(time_s, EventKind.OTHERS, place, 0)
        self._push(0.0, EventKind.TICK, 0, 0)
        heapify(self.events)

    def _push(self, time_s: float, kind: EventKind, subject: int, run: int) -> None:
        self.serial += 1
        heappush(self.events, (time_s, self.serial, kind, subject, run))

    def _start_work(
        self, now_s: float, kind: EventKind, request: int, run: int, work_s: float
    ) -> None:
        """Start work that ends after `work_s`, or later on a shared machine."""
        if self.cores is None:
            self._push(now_s + work_s, kind, request, run)
        else:
            self.cores.start(now_s, kind, request, run, work_s)

    def _has_open_requests(self) -> bool:
        busy = any(station.running or station.waiting for station in self.stations)
        return busy or self.entering > 0

    def _process_event(self, kind: EventKind, subject: int, run: int, now_s: float) -> None:
        match kind:
            case EventKind.SPECULATED:
                self._end_speculation(subject, run, now_s)
            case EventKind.PREFILLED:
                self._end_prefill(subject, run, now_s)
            case EventKind.DECODED:
                self._end_decoding(subject, run, now_s)
            case EventKind.ENTERED:
                self.entering -= 1
                self._enter(subject, now_s)
            case EventKind.READY:
                if self.stations[subject].add_ready(run, now_s):
                    self._go_on(now_s)
            case EventKind.FAILURE:
                self._fail(POOLS[subject], run, now_s)
            case EventKind.OTHERS:
                self._share_machine(subject, now_s)

    def _end_speculation(self, request: int, run: int, now_s: float) -> None:
        for scored in self._end_work(self.speculation, request, run, now_s):
            self._to_prefill(scored, now_s)
        self._serve(self.speculation, now_s)

    def _end_prefill(self, request: int, run: int, now_s: float) -> None:
        for computed in self._end_work(self.prefilling, request, run, now_s):
            self._first_token(computed, now_s)
        self._serve(self.prefilling, now_s)

    def _end_decoding(self, request: int, run: int, now_s: float) -> None:
        if self.decodes.end(request, run):
            self.decoding.end(request)
            self.records.completed += 1
            self._decode(now_s)

    def _share_machine(self, place: int, now_s: float) -> None:
        """Leave the part of the machine that other programs take from now on."""
        machine = self.world.machine
        if self.cores is not None and machine is not None:
            left = max(LEAST_CORES, machine.cores - self.world.others[place][1])
            self.cores.change(now_s, replace(machine, cores=left))

    def _arrive(self, request: int, now_s: float) -> None:
        aside = self.world.aside
        if aside is not None and self.cores is not None:
            self.cores.start(
                now_s, EventKind.ASIDE, request, 0, aside.seconds(self.prompt[request])
            )
        front = self.world.front
        if front is None:
            self._enter(request, now_s)
        else:
            self.entering += 1
            self._start_work(
                now_s, EventKind.ENTERED, request, 0, front.seconds(self.prompt[request])
            )

    def _enter(self, request: int, now_s: float) -> None:
        if self.admission is not None and not self._admit(request, self.admission):
            return
        if self.speculate_s[request] > 0.0:
            stage, tag = self.speculation, now_s
            if stage.limits is not None and stage.limits.shortest_first:
                tag = stage.turn_of(self._reading(request)[0])
            self.speculators.wait(request, tag, late=self.late[request])
            self._serve(stage, now_s)
        else:
            self._to_prefill(request, now_s)

    def _admit(self, request: int, policy: AdmissionPolicy) -> bool:
        """Lower the keep rate, put the request behind, or shed it, as the gateway does."""
        world = self.world
        keep = self.keep[request]  # 1.0: dense
        floor = min(keep, world.keep_floor)
        ask = AdmissionRequest(int(self.prompt[request]), keep, floor, world.timeout_s)
        verdict = judge(ask, self._backlog(), world.engines.curves, policy)
        if isinstance(verdict, Shed):
            self.records.shed.append(request)
            return False
        self.late[request] = verdict.late
        if verdict.keep < keep:
            self.kept[request] = verdict.keep * self.prompt[request]
        self.keep[request] = verdict.keep
        self.prefill_s[request] = verdict.prefill_s
        return True

    def _backlog(self) -> Backlog:
        first, second = self.speculators, self.prefills
        in_time_s, late_s = second.waits_s()
        return Backlog(
            speculate_s=first.waits_s()[0],
            prefill_s=in_time_s,
            late_s=late_s,
            waiting=first.in_time.count + second.in_time.count,
            waiting_late=first.late.count + second.late.count,
            decode_s=self.decoding.wait_s(self._decode_slots()),
        )

    def _decode_slots(self) -> float:
        return float(self.decodes.ready * self.world.engines.decode_slots)

    def _to_prefill(self, request: int, now_s: float) -> None:
        stage, work_s = self.prefilling, self.prefill_s[request]
        tag = now_s if self.admission is None else stage.served + work_s
        self.prefills.wait(request, tag, late=self.late[request])
        self._serve(stage, now_s)

    def _serve(self, stage: SimulatedStage, now_s: float) -> None:
        """Let the free engines of a stage begin what waits."""
        station = stage.station
        while station.free > 0 and station.waiting:
            taken = stage.take()
            if taken is None:
                return
            tag, request = taken
            run = station.start(request)
            if stage.limits is None:
                self._start_work(now_s, stage.kind, request, run, station.times_s[request])
            else:
                stage.begin_batch(tag, request)
                self._step(stage, request, run, now_s, stage.limits)

    def _step(
        self, stage: SimulatedStage, leader: int, run: int, now_s: float, limits: StepLimits
    ) -> None:
        """Fill an engine's next step, with prompts that wait if there is room."""
        self._start_work(now_s, stage.kind, leader, run, stage.start_step(leader, limits))

    def _end_work(self, stage: SimulatedStage, request: int, run: int, now_s: float) -> list[int]:
        """End an engine's request, or its step; return the requests that left the engine."""
        station = stage.station
        if stage.limits is None:
            return [request] if station.end(request, run) else []
        if station.running.get(request) != run:
            return []
        completed, batch = stage.end_step(request)
        if batch.prompts:
            if batch.leader != request:
                station.hand_over(request, batch.leader)
            self._step(stage, batch.leader, run, now_s, stage.limits)
        else:
            station.end(request, run)
        return completed

    def _reading(self, request: int) -> tuple[float, float]:
        remembered = self.prompt[request] * self.world.engines.remembered_share
        return self.prompt[request] - remembered, remembered

    def _prefilling(self, request: int) -> tuple[float, float]:
        cached = self.kept[request] * self.world.engines.cached_share
        return self.kept[request] - cached, cached

    def _waits(self, request: int) -> bool:
        return self.now_s - self.time_s[request] < self.world.timeout_s

    def _first_token(self, request: int, now_s: float) -> None:
        self.records.record_first_token(request, now_s, now_s - self.time_s[request])
        if self.decode_s[request] == 0.0:
            self.records.completed += 1
            return
        self.decoding.begin(request, 1, self._decode_slots())
        self.decodes.wait(request, now_s, late=False)  # engines know nothing of who is late
        self._decode(now_s)

    def _decode(self, now_s: float) -> None:
        station, curves = self.decodes, self.world.engines.curves
        while station.free > 0 and station.waiting:
            came_s, request = station.take_next()
            kept = self.keep[request] * self.prompt[request]
            gap_s = now_s - came_s + curves.transfer.seconds(kept)
            gap_s += curves.first_decode.seconds(kept)
            self.records.record_second_token(request, now_s, gap_s)
            run = station.start(request)
            work_s = self.decode_s[request]
            self._start_work(now_s, EventKind.DECODED, request, run, work_s)

    def _go_on(self, now_s: float) -> None:
        self._serve(self.speculation, now_s)
        self._serve(self.prefilling, now_s)
        self._decode(now_s)

    def _fail(self, pool: Pool, replicas: int, now_s: float) -> None:
        """Rerun what ran on the dead engines, from its stage on, ahead of the others."""
        station = self.stations[POOLS.index(pool)]
        batches = next((each.batches for each in self.stages if each.station is station), {})
        for request, run in list(station.die(replicas, now_s)):
            if self.cores is not None:
                self.cores.drop(now_s, END_OF_WORK[pool], request, run)
            batch = batches.pop(request, None)
            for lost in (request,) if batch is None else batch.requests:
                station.wait(lost, 0.0, late=False)
                if pool is Pool.PREFILL:
                    self.late[lost] = False
        self._go_on(now_s)

    def _tick(self, now_s: float, arrived: int) -> None:
        target = self.controller.target(self._telemetry(now_s, arrived))
        self.records.record_moment(now_s, self.stations, self.keep[self.seen : arrived])
        self.seen = arrived
        for place, pool in enumerate(POOLS):
            cold_s = self.world.cold_start_s[pool]
            for name in self.stations[place].resize(target.replicas[pool], now_s):
                self._push(now_s + cold_s, EventKind.READY, place, name)
        self._push(now_s + self.world.tick_s, EventKind.TICK, 0, 0)

    def _telemetry(self, now_s: float, arrived: int) -> Telemetry:
        start_s = max(0.0, now_s - LOOK_BACK_S)
        first = int(np.searchsorted(self.trace.time_s, start_s))
        every, part = self.arrivals, slice(first, arrived)
        seen = Arrivals(
            every.time_s[part],
            every.prompt_tokens[part],
            every.kept_tokens[part],
            every.output_tokens[part],
        )
        pools = {
            pool: PoolState(station.ready, len(station.starts), self._queue_age_s(station, now_s))
            for pool, station in zip(POOLS, self.stations, strict=True)
        }
        ongoing = {
            pool: len(station.waiting) + len(station.running)
            for pool, station in zip(POOLS, self.stations, strict=True)
        }
        observation = Observation(now_s, start_s, seen, pools, self.world.engines)
        return Telemetry(
            observation,
            ongoing,
            *self.records.recent_times(now_s),
            self.records.completed,
            self.records.first_tokens,
        )

    def _queue_age_s(self, station: Station, now_s: float) -> float:
        """Return the age of the oldest request that is not late."""
        waiting = (self.time_s[request] for late, _, _, request in station.waiting if not late)
        return now_s - min(waiting, default=now_s)
