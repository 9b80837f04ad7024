"""The speculator as a service where no model reads prompts: they are chosen by words."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

from ..config import SelectionConfig, SpeculatorConfig
from ..control.from_config import selection_policy
from ..core.errors import InvalidRequest, ScoringTimeout, SpeculatorUnavailable
from ..core.selection import SelectionPolicy, settle
from ..core.types import Plan, Request, Selection
from ..core.words import word_scores
from .choosing import Choosing
from .chunking import Chunker, load_chunker
from .jobs import Counts, Rating
from .kept_memory import KeptMemory

# Of what prompts kept, at most: by it routers know how much a replica remembers of conversations.
KEPT_TOKEN_BYTES = 64
CERTAINTY = 1.0  # nothing is generated that could be unsure


class WordsService:
    """The `Speculator` port without a draft model, in this process.

    It has the attributes of `SpeculatorService`; what is about keys and values is 0.
    """

    memory_bytes = remembered_bytes = 0
    has_failed = False

    def __init__(
        self,
        policy: SelectionPolicy,
        load_chunks: Callable[[], Chunker],
        kept_memory_bytes: int,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._policy = policy
        self._load_chunks = load_chunks
        self._chunker: Chunker | None = None
        self._choosing = Choosing(KeptMemory(kept_memory_bytes))
        self.prefix_cache_tokens = kept_memory_bytes // KEPT_TOKEN_BYTES
        self._now = now
        self._scoring = 0
        self.counts = Counts()

    @classmethod
    def from_config(
        cls,
        config: SpeculatorConfig,
        selection: SelectionConfig,
        main_path: str,
        block_tokens: int,
    ) -> WordsService:
        """Make the service of a deployment.

        `main_path` is the model whose tokens prompts have, `block_tokens` its KV block.
        """
        return cls(
            policy=selection_policy(selection, block_tokens),
            load_chunks=partial(load_chunker, selection, main_path),
            kept_memory_bytes=config.kept_memory_bytes,
        )

    @property
    def queue_length(self) -> int:
        """Number of prompts that wait: none, each has a thread."""
        return 0

    @property
    def batch_size(self) -> int:
        """Number of prompts that are being scored."""
        return self._scoring

    @property
    def is_running(self) -> bool:
        """True from `start` to `close`."""
        return self._chunker is not None

    async def start(self) -> None:
        """Read the main model's vocabulary."""
        self._chunker = await asyncio.to_thread(self._load_chunks)

    async def close(self) -> None:
        """Score no more. Idempotent."""
        self._chunker = None

    async def select(
        self, request: Request, plan: Plan, timeout_s: float, policy: SelectionPolicy | None = None
    ) -> Selection:
        """Score the prompt and keep about `plan.keep` of it.

        `policy` None: the deployment's.

        Raises ScoringTimeout, InvalidRequest, or SpeculatorUnavailable when the service is not
        running.
        """
        chunker, policy = self._chunker, policy or self._policy
        if chunker is None:
            raise SpeculatorUnavailable("speculator: not running")
        if len(request.prompt) == 0:
            raise InvalidRequest("the prompt is empty", field="prompt")
        settled = settle(len(request.prompt), plan, request.protected, policy)
        if settled is not None:
            return settled
        arrived_s = self._now()
        self._scoring += 1
        try:
            async with asyncio.timeout(timeout_s):
                rating = await asyncio.to_thread(_rate, request, policy.tail_tokens, chunker)
        except TimeoutError as error:
            self.counts.timeouts += 1
            message = f"speculator: no selection within {timeout_s:g} s"
            raise ScoringTimeout(message, 0.0, self._now() - arrived_s) from error
        finally:
            self._scoring -= 1
        chosen = self._choosing.select(request, plan, policy, rating)
        self.counts.prompts += 1
        self.counts.tokens += len(request.prompt)
        self.counts.read_s += self._now() - arrived_s
        return replace(chosen, speculate_s=self._now() - arrived_s)


def _rate(request: Request, tail_tokens: int, chunker: Chunker) -> Rating:
    chunks = chunker.chunks(request.prompt)
    scores = word_scores(request.prompt, request.asked, request.protected, tail_tokens, chunks)
    return Rating(scores, CERTAINTY, chunks)
