"""The speculator as a service: requests wait in a bounded queue, one thread scores them.

The thread owns the model, one pass at a time. Between passes the event loop owns everything: it
drops requests that were cancelled or ran out of time, and chooses what the next pass reads, or who
looks ahead (`schedule`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType

from ..config import SelectionConfig, SpeculatorConfig
from ..control.from_config import selection_policy
from ..core.carry_over import continue_selection
from ..core.errors import InvalidRequest, Overloaded, ScoringTimeout, SpeculatorUnavailable
from ..core.selection import SelectionPolicy, chunk_scores, select, settle
from ..core.types import Plan, PromptMode, Request, Selection, dense_selection
from .jobs import Batching, Counts, Job, Pace, Rating
from .kept_memory import KeptMemory
from .lru import ByteLru
from .prefix_memory import prompt_digest
from .reading import Reading
from .schedule import Limits, next_look_ahead, next_reading
from .scorer import Scorer, load_scorer

logger = logging.getLogger(__name__)

MIN_RETRY_AFTER_S = 0.1
MAX_FAILURES_IN_A_ROW = 3  # more than a bad prompt: the model or its device is broken


class SpeculatorService:
    """The `Speculator` port, in this process."""

    def __init__(
        self,
        load: Callable[[], Scorer],
        policy: SelectionPolicy,
        batching: Batching,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._load = load
        self._policy = policy
        self._batching = batching
        self._now = now
        self._queue: deque[Job] = deque()
        self._ratings: ByteLru[Rating] = ByteLru(batching.score_cache_bytes)
        self._kept = KeptMemory(batching.kept_memory_bytes)
        self._arrival = asyncio.Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="speculator")
        self._pace = Pace()
        self._scorer: Scorer | None = None
        self._begun: list[Job] = []
        self._read_tokens = 0
        self._loop_task: asyncio.Task[None] | None = None
        self.counts = Counts()

    @classmethod
    def from_config(
        cls,
        config: SpeculatorConfig,
        selection: SelectionConfig,
        main_path: str,
        block_tokens: int,
    ) -> SpeculatorService:
        """Make the service of a deployment.

        `main_path` is the model whose vocabulary must match, `block_tokens` its KV block.
        """
        return cls(
            load=partial(load_scorer, config, selection.pool_tokens, main_path),
            policy=selection_policy(selection, block_tokens),
            batching=Batching(
                config.max_batch,
                config.max_wait_s,
                max_queued=config.max_queued,
                score_cache_bytes=config.score_cache_bytes,
                kept_memory_bytes=config.kept_memory_bytes,
            ),
        )

    @property
    def prefix_cache_tokens(self) -> int:
        """Number of tokens whose keys and values can be remembered; 0 before `start`."""
        if self._scorer is None:
            return 0
        return self._scorer.memory_bytes // self._scorer.draft.layout.bytes_per_token

    @property
    def memory_bytes(self) -> int:
        """Room for keys and values; 0 before `start`."""
        return 0 if self._scorer is None else self._scorer.memory_bytes

    @property
    def remembered_bytes(self) -> int:
        """Bytes of keys and values that are remembered."""
        return 0 if self._scorer is None else self._scorer.prefix.bytes_held

    @property
    def queue_length(self) -> int:
        """Number of prompts that wait."""
        return len(self._queue)

    @property
    def batch_size(self) -> int:
        """Number of prompts that are being read or look ahead."""
        return len(self._begun)

    @property
    def is_running(self) -> bool:
        """True from `start` to `close`, unless the serving loop has failed."""
        return self._loop_task is not None and not self._loop_task.done()

    async def start(self) -> None:
        """Load the model. Raises UnsupportedModel when it cannot score for the main model."""
        loop = asyncio.get_running_loop()
        self._scorer = await loop.run_in_executor(self._thread, self._load)
        self._loop_task = asyncio.create_task(self._serve(self._scorer))

    async def close(self) -> None:
        """Fail what waits, drop what is being scored, and end the thread. Idempotent."""
        if self._loop_task is not None:
            self._loop_task.cancel()
            await asyncio.wait([self._loop_task])
        await asyncio.to_thread(self._thread.shutdown)
        self._scorer = None

    async def __aenter__(self) -> SpeculatorService:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()

    async def select(
        self, request: Request, plan: Plan, timeout_s: float, policy: SelectionPolicy | None = None
    ) -> Selection:
        """Score the prompt and keep about `plan.keep` of it.

        `policy` None: the deployment's.

        Raises ScoringTimeout, Overloaded, InvalidRequest, or SpeculatorUnavailable when the
        service is not running.
        """
        scorer = self._running_scorer()
        answer: asyncio.Future[Selection] = asyncio.get_running_loop().create_future()
        job = Job(request, plan, policy or self._policy, self._now(), answer)
        unscored = self._without_scores(scorer, job) or self._from_scores(job)
        if unscored is not None:
            return unscored
        try:
            async with asyncio.timeout(timeout_s):
                return await self._score_job(scorer, job)
        except TimeoutError as error:
            self.counts.timeouts += 1
            message = f"speculator: no selection within {timeout_s:g} s"
            raise ScoringTimeout(message, *job.spent_s(self._now())) from error

    async def _score_job(self, scorer: Scorer, job: Job) -> Selection:
        prompt = job.request.prompt
        if scorer.translator is None:
            job.read_as = scorer.translate(prompt)
        else:
            job.read_as = await asyncio.to_thread(scorer.translate, prompt)
        refusal = scorer.refusal(len(job.read_as.prompt))
        if refusal is not None:
            return dense_selection(len(prompt), refusal)
        job.remembered_tokens = scorer.prefix.count_known(
            job.read_as.prompt, job.request.cache_salt
        )
        self._enqueue(job)
        try:
            return await job.answer
        finally:
            self._drop_job(job)

    def _running_scorer(self) -> Scorer:
        if self._scorer is None or not self.is_running:
            raise SpeculatorUnavailable("speculator: not running")
        return self._scorer

    def _without_scores(self, scorer: Scorer, job: Job) -> Selection | None:
        """Return the dense selection of a prompt that need not be scored."""
        prompt = job.request.prompt
        if len(prompt) == 0:
            raise InvalidRequest("the prompt is empty", field="prompt")
        settled = settle(len(prompt), job.plan, job.request.protected, job.policy)
        if settled is not None:
            return settled
        if min(prompt) < 0 or max(prompt) >= scorer.vocabulary_size:
            raise InvalidRequest("a token id is outside the vocabulary", field="prompt")
        return None

    def _from_scores(self, job: Job) -> Selection | None:
        """Select; a prompt that was scored lately is not read again, whatever its plan."""
        rating = self._ratings.get(_rating_key(job.request))
        if rating is None:
            return None
        self.counts.repeats += 1
        chosen = self._select_tokens(rating, job)
        speculate_s = self._now() - job.arrived_s
        return replace(chosen, speculate_s=speculate_s, remembered_tokens=len(job.request.prompt))

    def _enqueue(self, job: Job) -> None:
        if len(self._queue) >= self._batching.max_queued:
            self.counts.shed += 1
            raise Overloaded("speculator: the queue is full", self._backlog_s())
        job.queued_at = self._read_tokens
        self._queue.append(job)
        self._arrival.set()

    def _backlog_s(self) -> float:
        """Estimate the seconds that the queue takes."""
        tokens = sum(job.unread_tokens for job in (*self._queue, *self._begun))
        return max(MIN_RETRY_AFTER_S, tokens * (self._pace.token_s or 0.0))

    def _drop_job(self, job: Job) -> None:
        """Note that nobody waits any more, and free the place in the queue."""
        job.abandoned = True
        if job in self._queue:
            self._queue.remove(job)

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
                    self.counts.failures += 1
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
                self._begun,
                self._queue,
                self._read_tokens,
                limits,
                lambda job: scorer.kv_bytes(len(job.read_as.prompt)),
            )
            ready = next_look_ahead(self._begun, reading, self._pace)
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
        held = sum(scorer.kv_bytes(len(job.read_as.prompt)) for job in self._begun)
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
                job.reading = scorer.open_reading(job.read_as.prompt, job.request.cache_salt)
        readings = [job.reading for job in jobs if job.reading is not None]
        unread, started_s = sum(each.unread_tokens for each in readings), self._now()
        scorer.read_pass(readings)
        scorer.wait_for_device()
        tokens = unread - sum(each.unread_tokens for each in readings)
        read_s = self._now() - started_s
        self.counts.read_s += read_s
        if tokens > 0:
            self._pace = self._pace.with_reading(read_s / tokens)

    def _look_ahead(self, scorer: Scorer, jobs: Sequence[Job], held: int) -> None:
        """Look ahead together, answer each, and remember the prompts (on the thread)."""
        loop, started_s = self._answers_on(jobs), self._now()
        readings = {job: job.reading for job in jobs if job.reading is not None}
        scorer.look_ahead(list(readings.values()))
        self._pace = self._pace.with_look_ahead(self._now() - started_s)
        self.counts.batches += 1
        self.counts.look_ahead_s += self._now() - started_s
        for job, reading in readings.items():
            self.counts.tokens += len(reading.prompt)
            self.counts.cached_tokens += reading.cached_tokens
            rating = Rating(job.read_as.scores(scorer.rate(reading)), reading.certainty)
            remembered = _remembered_tokens(reading, len(job.request.prompt))
            loop.call_soon_threadsafe(self._answer, job, rating, remembered)
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

    def _answer(self, job: Job, rating: Rating, remembered: int) -> None:
        """Set the selection, unless its caller has gone since (on the event loop)."""
        self._ratings.put(_rating_key(job.request), rating, rating.scores.nbytes)
        if job.answer.done():
            return
        chosen = self._select_tokens(rating, job)
        queue_s, speculate_s = job.spent_s(self._now())
        self.counts.prompts += 1
        self.counts.queue_s += queue_s
        job.answer.set_result(
            replace(
                chosen,
                queue_s=queue_s,
                speculate_s=speculate_s,
                remembered_tokens=remembered,
            )
        )

    def _select_tokens(self, rating: Rating, job: Job) -> Selection:
        """Select as the conversation's last turn did, and remember it for the next."""
        request, scores, policy = job.request, rating.scores, job.policy
        protected, certainty = request.protected, rating.certainty
        if request.wants_scores:
            chosen = select(scores, job.plan, protected, policy, certainty)
            return replace(chosen, scores=chunk_scores(scores, protected, policy, certainty))
        carries = policy.carry_over and job.plan.mode is PromptMode.POSITIONS
        before = self._kept.find(request.prompt, request.cache_salt) if carries else None
        if before is None:
            chosen = select(scores, job.plan, protected, policy, certainty)
        else:
            chosen = continue_selection(scores, job.plan, protected, policy, certainty, before)
        if carries:
            self._kept.remember(request.prompt, chosen, job.plan.reason, request.cache_salt)
        return chosen


def _remembered_tokens(reading: Reading, prompt_tokens: int) -> int:
    """Return the share of prompt tokens that was not read again; the draft may count others."""
    return reading.cached_tokens * prompt_tokens // len(reading.prompt)


def _rating_key(request: Request) -> bytes:
    return prompt_digest(request.prompt, request.cache_salt)
