"""Compares pruned answers with dense ones on a share of live traffic.

A sampled request is answered again, dense, in the background, while there is capacity to spare;
nobody waits for it. Greedy answers only: sampled ones differ anyway.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import xxhash

from ...core.errors import SpecPrefillError
from ...core.ports import Answerer
from ...core.types import Chunk, Controls, Plan, PlanKind, Reason, Report, Request, TokenLogprob

logger = logging.getLogger(__name__)

HASH_RANGE = 1 << 64


class ShadowOutcome(enum.StrEnum):
    """The outcome of a sampled request."""

    EQUAL = "equal"
    DIFFERENT = "different"
    DROPPED = "dropped"  # no capacity to spare
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Divergence:
    """The token-by-token comparison of a pruned answer with the dense one."""

    pruned_tokens: int
    dense_tokens: int
    agreement_tokens: int  # equal tokens before the first that differs
    # At the first difference: how much more likely, in nats, the dense model holds its own token
    # than the pruned one; a lower bound where the pruned one is not among the candidates.
    # None: no difference, or no candidates.
    logprob_gap: float | None

    @property
    def is_equal(self) -> bool:
        """True if both answers have the same tokens."""
        return self.agreement_tokens == self.pruned_tokens == self.dense_tokens

    @property
    def agreement_share(self) -> float:
        """The agreement as a share of the longer answer."""
        longer = max(self.pruned_tokens, self.dense_tokens)
        return 1.0 if longer == 0 else self.agreement_tokens / longer


# Called with the keep rate of the pruned answer.
Record = Callable[[ShadowOutcome, float, Divergence | None], None]


class Shadow:
    """Runs dense copies of sampled requests.

    `dense_copy` makes the request that is sent (greedy requests only: None otherwise); `is_busy`
    returns True if live requests need the capacity; `record` gets the outcome of each copy.
    """

    def __init__(
        self,
        pipeline: Answerer,
        share: float,
        max_running: int,
        dense_copy: Callable[[Request], Request | None],
        is_busy: Callable[[], bool],
        record: Record,
        longest: int | None = None,
    ) -> None:
        """`longest`: tokens of a prompt and its answer in an engine; None: any number."""
        self._longest = longest
        self._pipeline = pipeline
        self._share = share
        self._max_running = max_running
        self._dense_copy = dense_copy
        self._is_busy = is_busy
        self._record = record
        self._running: set[asyncio.Task[None]] = set()

    def is_sampled(self, request: Request) -> bool:
        """Return True if the request is in the sample: by its id, so that a repeat is, too."""
        if self._share <= 0.0 or request.samples != 1:
            return False
        return xxhash.xxh3_64_intdigest(request.request_id.encode()) < self._share * HASH_RANGE

    def offer(self, request: Request, answer: Sequence[int], report: Report) -> None:
        """Compare a pruned answer with a dense one, in the background, or drop it."""
        if self._longest is not None and len(request.prompt) + len(answer) >= self._longest:
            return  # it was answered in text mode, or would end elsewhere
        copy = self._dense_copy(request)
        if copy is None:
            return
        if len(self._running) >= self._max_running or self._is_busy():
            self._record(ShadowOutcome.DROPPED, report.keep_rate, None)
            return
        task = asyncio.create_task(self._compare(copy, tuple(answer), report.keep_rate))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def wait_until_idle(self) -> None:
        """Wait until every copy that runs has ended."""
        await asyncio.gather(*self._running)

    async def close(self) -> None:
        """Cancel what runs. Idempotent."""
        for task in self._running:
            task.cancel()
        if self._running:
            await asyncio.wait(self._running)

    async def _compare(self, copy: Request, answer: tuple[int, ...], keep_rate: float) -> None:
        try:
            dense = await _collect_answer(self._pipeline, copy)
        except SpecPrefillError as error:
            logger.info("request_id=%s shadow failed: %s", copy.request_id, error)
            self._record(ShadowOutcome.FAILED, keep_rate, None)
            return
        found = compare(answer, dense)
        self._record(
            ShadowOutcome.EQUAL if found.is_equal else ShadowOutcome.DIFFERENT, keep_rate, found
        )


def dense_request(request: Request, sampling: bytes) -> Request:
    """Return a dense copy of `request`; `sampling` may ask for more candidates."""
    return replace(
        request,
        request_id=f"shadow-{request.request_id}",
        sampling=sampling,
        controls=Controls(prune=False),
        plan=Plan(PlanKind.DENSE, Reason.ASKED_OFF),
        trace=None,  # its span has ended
    )


def compare(pruned: Sequence[int], dense: Sequence[Chunk]) -> Divergence:
    """Find the first token that differs. `dense` is one whole answer, in order."""
    tokens = [token for chunk in dense for token in chunk.token_ids]
    pairs = zip(pruned, tokens, strict=False)
    agreed = next((i for i, (one, other) in enumerate(pairs) if one != other), None)
    if agreed is None:
        return Divergence(len(pruned), len(tokens), min(len(pruned), len(tokens)), None)
    candidates = [each for chunk in dense for each in chunk.logprobs or ()]
    gap = _gap(candidates[agreed], pruned[agreed], tokens[agreed]) if candidates else None
    return Divergence(len(pruned), len(tokens), agreed, gap)


def _gap(candidates: Sequence[TokenLogprob], pruned: int, dense: int) -> float:
    by_token = {each.token_id: each.logprob for each in candidates}
    return by_token[dense] - by_token.get(pruned, min(by_token.values()))


async def _collect_answer(pipeline: Answerer, request: Request) -> list[Chunk]:
    async with aclosing(pipeline.generate(request)) as chunks:
        return [chunk async for chunk in chunks]
