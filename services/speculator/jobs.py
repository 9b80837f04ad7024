"""Values of the speculator's service: requests under way, limits, pace, counts."""

from __future__ import annotations

import asyncio
from concurrent.futures import Future
from dataclasses import dataclass, field

from ..control.reading_order import reading_turn
from ..core.chunks import Chunks
from ..core.selection import Scores, SelectionPolicy
from ..core.types import Plan, Request, Selection
from .reading import Reading
from .translation import Prompt, SamePrompt

SMOOTHING = 0.2  # weight of the newest measurement in `Pace`


@dataclass(frozen=True, slots=True)
class Batching:
    """Limits of batching, and of the queue."""

    max_batch: int = 8
    max_wait_s: float = 0.0  # to fill a batch
    max_queued: int = 64  # more are shed
    score_cache_bytes: int = 64 << 20  # of recent prompts' scores
    kept_memory_bytes: int = 32 << 20  # of what recent prompts kept


@dataclass(frozen=True, slots=True)
class Pace:
    """Measured cost of the two phases, smoothed; None before the first measurement."""

    token_s: float | None = None  # prefill, per prompt token
    look_ahead_s: float | None = None  # look-ahead of one batch

    def with_reading(self, token_s: float) -> Pace:
        """Return this pace, moved toward a new measurement of reading."""
        return Pace(_smooth(self.token_s, token_s), self.look_ahead_s)

    def with_look_ahead(self, look_ahead_s: float) -> Pace:
        """Return this pace, moved toward a new measurement of looking ahead."""
        return Pace(self.token_s, _smooth(self.look_ahead_s, look_ahead_s))

    def pays_to_wait(self, waiting: int, unread_tokens: int) -> bool:
        """Return True if `waiting` prompts, read to their end, should wait for one more.

        Each of them waits until that one is read; it saves a look-ahead of its own. So long prompts
        look ahead alone, short ones together.
        """
        if self.token_s is None or self.look_ahead_s is None:
            return True
        return waiting * unread_tokens * self.token_s <= self.look_ahead_s


@dataclass(slots=True)
class Counts:
    """The service's counts so far. The event loop and the thread each write their own fields."""

    prompts: int = 0  # scored; repeats that were remembered count apart
    batches: int = 0  # of prompts that looked ahead together
    tokens: int = 0  # of scored prompts, as the draft model counts them
    cached_tokens: int = 0  # of them: their keys and values were remembered
    repeats: int = 0  # prompts whose scores were remembered
    read_s: float = 0.0
    look_ahead_s: float = 0.0
    queue_s: float = 0.0  # of scored prompts
    timeouts: int = 0
    shed: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Rating:
    """The draft model's scores of a prompt, whatever plan it comes with."""

    scores: Scores
    certainty: float  # how sure it was of its least sure look-ahead token, in [0, 1]
    chunks: Chunks | None = None  # None: of equal lengths

    @property
    def nbytes(self) -> int:
        """The memory that it takes."""
        return self.scores.nbytes + (0 if self.chunks is None else self.chunks.nbytes)


@dataclass(eq=False, slots=True)
class Job:
    """One request, from its arrival to its answer."""

    request: Request
    plan: Plan
    policy: SelectionPolicy
    arrived_s: float
    answer: asyncio.Future[Selection]
    read_as: Prompt = field(default_factory=lambda: SamePrompt(()))  # known when it is queued
    queued_at: int = 0  # tokens that the service had read by then
    remembered_tokens: int = 0  # of the prompt, when it is queued
    read_tokens: int = 0
    reading: Reading | None = None  # None: it waits
    worked_s: float = 0.0  # in the passes that it took part in, before the running one
    working_since_s: float | None = None  # in a pass that runs
    abandoned: bool = False  # nobody waits for the answer any more
    echo: tuple[int, ...] = ()  # of what is asked, in draft tokens
    cutting: Future[Chunks] | None = None  # into chunks, meanwhile; None: of equal lengths

    @property
    def unread_tokens(self) -> int:
        """Prompt tokens still to be read; before it is begun, an estimate."""
        if self.reading is None:
            return max(0, len(self.read_as.prompt) - 1 - self.remembered_tokens)
        return self.reading.unread_tokens

    @property
    def is_read(self) -> bool:
        """True once only its look-ahead is missing."""
        return self.reading is not None and self.reading.unread_tokens == 0

    @property
    def turn(self) -> float:
        """What the order of the prompts is by, lowest first; see `reading_order`."""
        return reading_turn(self.unread_tokens, self.read_tokens, self.queued_at)

    def spent_s(self, now_s: float) -> tuple[float, float]:
        """Return seconds in the queue or behind other prompts, and seconds of its own passes."""
        running_s = 0.0 if self.working_since_s is None else now_s - self.working_since_s
        worked_s = self.worked_s + running_s
        return now_s - self.arrived_s - worked_s, worked_s


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
