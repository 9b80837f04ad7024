"""The speculator as a service: requests wait in a bounded queue, one thread scores them in batches.

The thread owns the model. The event loop owns the queue and hands out batches; a request that was
cancelled or ran out of time is marked, and the thread drops it between two prefill chunks.
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
        self._scoring: Sequence[Job] = ()
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
        """Number of prompts in the batch that is being scored."""
        return len(self._scoring)

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
        self._queue.append(job)
        self._arrival.set()

    def _backlog_s(self) -> float:
        """Estimate the seconds that the queue takes."""
        tokens = sum(len(job.read_as.prompt) for job in self._queue)
        return max(MIN_RETRY_AFTER_S, tokens * (self._pace.token_s or 0.0))

    def _drop_job(self, job: Job) -> None:
        """Notify the thread that nobody waits any more, and free the place in the queue."""
        job.abandoned.set()
        if job in self._queue:
            self._queue.remove(job)

    async def _serve(self, scorer: Scorer) -> None:
        """Score batch after batch. A batch that fails fails its own requests.

        Several in a row end the service, so that its replica is replaced.
        """
        loop = asyncio.get_running_loop()
        failures = 0
        try:
            while failures < MAX_FAILURES_IN_A_ROW:
                self._scoring = await self._next_batch(scorer)
                self.counts.batches += 1
                try:
                    await loop.run_in_executor(
                        self._thread, self._score, scorer, self._scoring, loop
                    )
                    failures = 0
                except Exception as error:
                    failures += 1
                    self.counts.failures += 1
                    logger.exception("speculator: a batch of %d failed", len(self._scoring))
                    self._fail(self._scoring, f"speculator: {error}")
                self._scoring = ()
        finally:
            self._fail([*self._scoring, *self._queue], "speculator: stopped")

    async def _next_batch(self, scorer: Scorer) -> list[Job]:
        """Wait for requests, briefly for more of them, and take those that gain by being joined."""
        while True:
            if not self._queue:
                self._arrival.clear()
                await self._arrival.wait()
            if len(self._queue) < self._batching.max_batch and self._batching.max_wait_s > 0:
                await asyncio.sleep(self._batching.max_wait_s)
            if self._queue:  # all of them may have left meanwhile
                return self._take_batch(scorer)

    def _take_batch(self, scorer: Scorer) -> list[Job]:
        """Take the oldest request, and those behind it that gain by being joined and fit."""
        batch = [self._queue.popleft()]
        free = scorer.memory_bytes - scorer.kv_bytes(len(batch[0].read_as.prompt))
        for job in list(self._queue):
            needed = scorer.kv_bytes(len(job.read_as.prompt))
            pays = self._pace.pays_to_join(len(batch), len(job.read_as.prompt))
            if len(batch) < self._batching.max_batch and pays and needed <= free:
                self._queue.remove(job)
                batch.append(job)
                free -= needed
        return batch

    def _fail(self, jobs: Sequence[Job], message: str) -> None:
        for job in jobs:
            job.abandoned.set()
            if not job.answer.done():
                job.answer.set_exception(SpeculatorUnavailable(message))

    def _score(self, scorer: Scorer, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop) -> None:
        """Read the prompts, look ahead together, answer each, remember them (on the thread)."""
        started_s = self._now()
        for job in jobs:
            job.started_s = started_s
        prompts = [job.read_as.prompt for job in jobs]
        salts = [job.request.cache_salt for job in jobs]
        with scorer.open_readings(prompts, salts) as readings:
            of = dict(zip(readings, jobs, strict=True))
            read = scorer.read(readings, lambda reading: of[reading].abandoned.is_set())
            read_s = self._now()
            scorer.look_ahead(read)
            self._measure(read, read_s - started_s, self._now() - read_s)
            for reading in read:
                scores = of[reading].read_as.scores(scorer.rate(reading))
                rating = Rating(scores, reading.certainty)
                remembered = _remembered_tokens(reading, len(of[reading].request.prompt))
                loop.call_soon_threadsafe(self._answer, of[reading], rating, started_s, remembered)
            scorer.remember(read)

    def _measure(self, read: Sequence[Reading], read_s: float, look_ahead_s: float) -> None:
        cached = sum(reading.cached_tokens for reading in read)
        tokens = sum(len(reading.prompt) for reading in read) - cached
        counts = self.counts
        counts.tokens += tokens + cached
        counts.cached_tokens += cached
        counts.read_s += read_s
        counts.look_ahead_s += look_ahead_s
        if tokens > 0:
            self._pace = self._pace.with_measurement(read_s / tokens, look_ahead_s)

    def _answer(self, job: Job, rating: Rating, started_s: float, remembered: int) -> None:
        """Set the selection, unless its caller has gone since (on the event loop)."""
        self._ratings.put(_rating_key(job.request), rating, rating.scores.nbytes)
        if job.answer.done():
            return
        self.counts.prompts += 1
        self.counts.queue_s += started_s - job.arrived_s
        chosen = self._select_tokens(rating, job)
        timed = replace(
            chosen,
            queue_s=started_s - job.arrived_s,
            speculate_s=self._now() - started_s,
            remembered_tokens=remembered,
        )
        job.answer.set_result(timed)

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
