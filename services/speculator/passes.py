"""The speculator's one thread, which owns the model: what it does next, pass by pass.

Between passes the event loop owns everything: it drops requests that were cancelled or ran out of
time, and chooses what the next pass reads, or who looks ahead (`schedule`).
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor

from ..core.errors import Overloaded, SpeculatorUnavailable
from .jobs import Batching, Counts, Job, Pace, Rating
from .reading import Reading
from .schedule import Limits, next_look_ahead, next_reading
from .scorer import Scorer

logger = logging.getLogger(__name__)

MIN_RETRY_AFTER_S = 0.1
MAX_FAILURES_IN_A_ROW = 3  # more than a bad prompt: the model or its device is broken
OnRated = Callable[[Job, Rating, int], None]  # the job, its rating, and its remembered tokens


class Passes:
    """Jobs wait in a bounded queue and take part in passes until they are rated."""

    def __init__(
        self, batching: Batching, counts: Counts, now: Callable[[], float], on_rated: OnRated
    ) -> None:
        """`on_rated` is called on the event loop, also for a job that nobody waits for any more."""
        self._batching = batching
        self._counts = counts
        self._now = now
        self._on_rated = on_rated
        self._queue: deque[Job] = deque()
        self._begun: list[Job] = []
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="speculator")
        self._loop_task: asyncio.Task[None] | None = None
        self._read_tokens = 0
        self.pace = Pace()

    @property
    def waiting(self) -> int:
        """Number of prompts that wait."""
        return len(self._queue)

    @property
    def begun(self) -> int:
        """Number of prompts that are being read or look ahead."""
        return len(self._begun)

    @property
    def is_running(self) -> bool:
        """True from `start` to `close`, unless the serving loop has failed."""
        return self._loop_task is not None and not self._loop_task.done()

    @property
    def has_failed(self) -> bool:
        """True once the serving loop has ended by itself."""
        task = self._loop_task
        return task is not None and task.done() and not task.cancelled()

    async def start(self, load: Callable[[], Scorer]) -> Scorer:
        """Load the model on the thread, and begin. Raises what `load` raises."""
        scorer = await asyncio.get_running_loop().run_in_executor(self._thread, load)
        self._loop_task = asyncio.create_task(self._serve(scorer))
        return scorer

    async def close(self) -> None:
        """Fail what waits, drop what is being scored, and end the thread. Idempotent."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
        await asyncio.to_thread(self._thread.shutdown)

    def enqueue(self, job: Job) -> None:
        """Let a job wait for its turn. Raises Overloaded when the queue is full."""
        if len(self._queue) >= self._batching.max_queued:
            self._counts.shed += 1
            raise Overloaded("speculator: the queue is full", self._backlog_s())
        job.queued_at = self._read_tokens
        self._queue.append(job)
        self._arrival.set()

    def drop(self, job: Job) -> None:
        """Note that nobody waits any more, and free the place in the queue."""
        job.abandoned = True
        if job in self._queue:
            self._queue.remove(job)

    def _backlog_s(self) -> float:
        """Estimate the seconds that the queue takes."""
        tokens = sum(job.unread_tokens for job in (*self._queue, *self._begun))
        return max(MIN_RETRY_AFTER_S, tokens * (self.pace.token_s or 0.0))

    async def _serve(self, scorer: Scorer) -> None:
        """Run pass after pass. One that fails fails the requests that took part in it.

        Several in a row end the service, so that its replica is replaced.
        """
        failures = 0
        try:
            while failures < MAX_FAILURES_IN_A_ROW:
                jobs, look_ahead = await self._next_pass(scorer)
                try:
                    await self._run_pass(scorer, jobs, look_ahead=look_ahead)
                    failures = 0 if look_ahead else failures  # only an answer is a success
                except Exception as error:
                    failures += 1
                    self._counts.failures += 1
                    logger.exception("speculator: a pass of %d failed", len(jobs))
                    self._fail(jobs, f"speculator: {error}")
                    self._release(jobs)
        finally:
            self._fail([*self._begun, *self._queue], "speculator: stopped")

    async def _next_pass(self, scorer: Scorer) -> tuple[list[Job], bool]:
        """Wait for requests, and return those of the next pass, and whether they look ahead."""
        limits = Limits(scorer.prefill_chunk_tokens, self._batching.max_batch, scorer.memory_bytes)
        while True:
            self._release([job for job in self._begun if job.abandoned])
            if not self._begun:
                await self._wait_for_some()
            reading = next_reading(
                self._begun, self._queue, limits, lambda job: _kv_bytes(scorer, job)
            )
            ready = next_look_ahead(self._begun, reading, self.pace)
            if ready:
                return ready, True
            if reading:  # all of them may have left meanwhile
                return reading, False

    async def _wait_for_some(self) -> None:
        """Wait for a request, and briefly for more of them."""
        if not self._queue:
            self._arrival.clear()
            await self._arrival.wait()
        if len(self._queue) < self._batching.max_batch and self._batching.max_wait_s > 0:
            await asyncio.sleep(self._batching.max_wait_s)

    async def _run_pass(self, scorer: Scorer, jobs: Sequence[Job], *, look_ahead: bool) -> None:
        """Run one pass on the thread."""
        started_s = self._now()
        for job in jobs:
            job.working_since_s = started_s
            if job.reading is None:
                self._queue.remove(job)
                self._begun.append(job)
        held = sum(_kv_bytes(scorer, job) for job in self._begun)
        work = self._look_ahead if look_ahead else self._read
        loop = asyncio.get_running_loop()
        try:
            await loop.run_in_executor(self._thread, work, scorer, jobs, held)
        finally:
            pass_s = self._now() - started_s
            for job in jobs:
                job.worked_s += pass_s
                job.working_since_s = None
        self._read_tokens = self._read_tokens if look_ahead else self._count_read(jobs)
        if look_ahead:
            self._release(jobs)

    def _read(self, scorer: Scorer, jobs: Sequence[Job], held: int) -> None:
        """Read the next chunk of the prompts (on the thread)."""
        scorer.make_room(held)
        for job in jobs:
            if job.reading is None:
                job.reading = scorer.open_reading(
                    job.read_as.prompt, job.request.cache_salt, job.echo
                )
        readings = [job.reading for job in jobs if job.reading is not None]
        unread, started_s = sum(each.unread_tokens for each in readings), self._now()
        scorer.read_pass(readings)
        scorer.wait_for_device()
        tokens = unread - sum(each.unread_tokens for each in readings)
        read_s = self._now() - started_s
        self._counts.read_s += read_s
        if tokens > 0:
            self.pace = self.pace.with_reading(read_s / tokens)

    def _look_ahead(self, scorer: Scorer, jobs: Sequence[Job], held: int) -> None:
        """Look ahead together, answer each, and remember the prompts (on the thread)."""
        loop, started_s = self._answers_on(jobs), self._now()
        readings = {job: job.reading for job in jobs if job.reading is not None}
        scorer.look_ahead(list(readings.values()))
        self.pace = self.pace.with_look_ahead(self._now() - started_s)
        self._counts.batches += 1
        self._counts.look_ahead_s += self._now() - started_s
        for job, reading in readings.items():
            self._counts.tokens += len(reading.prompt)
            self._counts.cached_tokens += reading.cached_tokens
            scores = job.read_as.scores(scorer.rate(reading))
            try:
                chunks = None if job.cutting is None else job.cutting.result()
            except CancelledError:  # its caller has left
                continue
            rating = Rating(scores, reading.certainty, chunks)
            remembered = _remembered_tokens(reading, len(job.request.prompt))
            loop.call_soon_threadsafe(self._on_rated, job, rating, remembered)
        scorer.remember(list(readings.values()), held)
        for reading in readings.values():
            reading.release()

    @staticmethod
    def _answers_on(jobs: Sequence[Job]) -> asyncio.AbstractEventLoop:
        return jobs[0].answer.get_loop()

    def _count_read(self, jobs: Sequence[Job]) -> int:
        """Count what a pass has read of each prompt; return the tokens that were read in all."""
        total = self._read_tokens
        for job in jobs:
            if job.reading is not None:
                tokens = job.reading.length - job.reading.cached_tokens - job.read_tokens
                job.read_tokens += tokens
                total += tokens
        return total

    def _release(self, jobs: Sequence[Job]) -> None:
        """Free the memory of requests that are finished, or that nobody waits for."""
        for job in jobs:
            self._begun.remove(job)
            if job.reading is not None:
                job.reading.release()

    def _fail(self, jobs: Sequence[Job], message: str) -> None:
        for job in jobs:
            job.abandoned = True
            if not job.answer.done():
                job.answer.set_exception(SpeculatorUnavailable(message))


def _kv_bytes(scorer: Scorer, job: Job) -> int:
    return scorer.kv_bytes(len(job.read_as.prompt), len(job.echo))


def _remembered_tokens(reading: Reading, prompt_tokens: int) -> int:
    """Return the share of prompt tokens that was not read again; the draft may count others."""
    return reading.cached_tokens * prompt_tokens // len(reading.prompt)
