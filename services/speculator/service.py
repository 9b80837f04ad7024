"""The speculator as a service: what a prompt keeps, by its scores.

The passes over the draft model are those of `passes`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from types import TracebackType

from ..config import SelectionConfig, SpeculatorConfig
from ..control.from_config import selection_policy
from ..core.errors import InvalidRequest, ScoringTimeout, SpeculatorUnavailable
from ..core.selection import SelectionPolicy, settle
from ..core.types import Plan, Reason, Request, Selection, dense_selection
from .choosing import Choosing
from .chunking import Chunker, load_chunker
from .jobs import Batching, Counts, Job, Rating
from .kept_memory import KeptMemory
from .lru import ByteLru
from .passes import Passes
from .prefix_memory import prompt_digest
from .scorer import Scorer, load_scorer


class SpeculatorService:
    """The `Speculator` port, in this process."""

    def __init__(
        self,
        load: Callable[[], Scorer],
        policy: SelectionPolicy,
        batching: Batching,
        now: Callable[[], float] = time.monotonic,
        load_chunks: Callable[[], Chunker] | None = None,
    ) -> None:
        """`load_chunks` None: chunks of equal lengths."""
        self._load = load
        self._load_chunks = load_chunks
        self._chunker: Chunker | None = None
        self._cutting = ThreadPoolExecutor(1, "chunks")  # while prompts wait and are read
        self._policy = policy
        self._now = now
        self._ratings: ByteLru[Rating] = ByteLru(batching.score_cache_bytes)
        self._choosing = Choosing(KeptMemory(batching.kept_memory_bytes))
        self._scorer: Scorer | None = None
        self.counts = Counts()
        self._passes = Passes(batching, self.counts, now, self._answer)

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
            load_chunks=partial(load_chunker, selection, main_path),
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
        return self._passes.waiting

    @property
    def batch_size(self) -> int:
        """Number of prompts that are being read or look ahead."""
        return self._passes.begun

    @property
    def is_running(self) -> bool:
        """True from `start` to `close`, unless the serving loop has failed."""
        return self._passes.is_running

    @property
    def has_failed(self) -> bool:
        """True once the serving loop has ended by itself."""
        return self._passes.has_failed

    async def start(self) -> None:
        """Load the model. Raises UnsupportedModel when it cannot score for the main model."""
        if self._load_chunks is not None:
            self._chunker = await asyncio.to_thread(self._load_chunks)
        self._scorer = await self._passes.start(self._load)

    async def close(self) -> None:
        """Fail what waits, drop what is being scored, and end the thread. Idempotent."""
        await self._passes.close()
        self._cutting.shutdown(wait=False, cancel_futures=True)
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
        if not job.read_as.prompt:  # its tokens have no text that the draft could read
            return dense_selection(len(prompt), Reason.FLAT_SCORES)
        refusal = scorer.refusal(len(job.read_as.prompt))
        if refusal is not None:
            return dense_selection(len(prompt), refusal)
        job.echo = scorer.echo_of(job.read_as, job.request.asked)
        job.remembered_tokens = scorer.prefix.count_known(
            job.read_as.prompt, job.request.cache_salt
        )
        self._passes.enqueue(job)
        if self._chunker is not None:  # of no prompt that is shed
            job.cutting = self._cutting.submit(self._chunker.chunks, prompt)
        try:
            return await job.answer
        finally:
            self._passes.drop(job)
            if job.cutting is not None:
                job.cutting.cancel()

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
        chosen = self._choosing.select(job.request, job.plan, job.policy, rating)
        speculate_s = self._now() - job.arrived_s
        return replace(chosen, speculate_s=speculate_s, remembered_tokens=len(job.request.prompt))

    def _answer(self, job: Job, rating: Rating, remembered: int) -> None:
        """Set the selection, unless its caller has gone since (on the event loop)."""
        self._ratings.put(_rating_key(job.request), rating, rating.nbytes)
        if job.answer.done():
            return
        chosen = self._choosing.select(job.request, job.plan, job.policy, rating)
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


def _rating_key(request: Request) -> bytes:
    digest = prompt_digest(request.prompt, request.cache_salt)
    return digest + repr(request.asked).encode() if request.asked else digest
