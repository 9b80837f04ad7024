"""Values of the speculator's service: requests under way, batching, pace, counts."""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass, field

from ..core.selection import Scores, SelectionPolicy
from ..core.types import Plan, Request, Selection
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

    def with_measurement(self, token_s: float, look_ahead_s: float) -> Pace:
        """Return this pace, moved toward a new measurement."""
        return Pace(_smooth(self.token_s, token_s), _smooth(self.look_ahead_s, look_ahead_s))

    def pays_to_join(self, joined: int, prompt_tokens: int) -> bool:
        """Return True if a batch of `joined` requests should take one more prompt.

        Every request in the batch waits for the prefill of the new one; the new one saves a
        look-ahead of its own. Long prompts are thus scored alone, short ones together.
        """
        if self.token_s is None or self.look_ahead_s is None:
            return True
        return joined * prompt_tokens * self.token_s <= self.look_ahead_s


@dataclass(slots=True)
class Counts:
    """The service's counts so far. The event loop and the thread each write their own fields."""

    prompts: int = 0  # scored; repeats that were remembered count apart
    batches: int = 0
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


@dataclass(eq=False, slots=True)
class Job:
    """One request, from its arrival to its answer."""

    request: Request
    plan: Plan
    policy: SelectionPolicy
    arrived_s: float
    answer: asyncio.Future[Selection]
    read_as: Prompt = field(default_factory=lambda: SamePrompt(()))  # known when it is queued
    started_s: float | None = None  # None: it waits
    abandoned: threading.Event = field(default_factory=threading.Event)

    def spent_s(self, now_s: float) -> tuple[float, float]:
        """Return seconds in the queue, and on the thread."""
        started_s = now_s if self.started_s is None else self.started_s
        return started_s - self.arrived_s, now_s - started_s


def _smooth(old: float | None, new: float) -> float:
    return new if old is None else old + SMOOTHING * (new - old)
