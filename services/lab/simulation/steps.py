"""The steps of one engine, shared by prompts: chunks of them, up to a token budget.

A prefill engine's step takes the oldest prompts first, a speculator's pass those whose turn it is
(`control.reading_order`). One that does not fit goes on in the next step, which others may join;
all that a step completes leave the engine at its end.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf

from ...control.reading_order import AGEING
from ...control.stages import Curve


@dataclass(frozen=True, slots=True)
class StepLimits:
    """The limits of one step."""

    tokens: int  # vLLM's max_num_batched_tokens, or the speculator's prefill_chunk_tokens
    prompts: int  # vLLM's max_num_seqs, or the speculator's max_batch
    shortest_first: bool = False  # as a speculator; False: those that have begun go first


@dataclass(slots=True)
class EnginePrompt:
    """A prompt in an engine."""

    request: int
    left: float  # tokens to compute
    done: float  # tokens before those: computed or cached
    tag: float  # what the queue was ordered by
    chunk: float = 0.0  # of them, in this step
    is_new: bool = True
    computed: float = 0.0

    @property
    def turn(self) -> float:
        """The tag that it would have in the queue now, where those with the fewest go first."""
        return self.tag - self.computed + AGEING * self.computed


@dataclass(slots=True)
class Batch:
    """The prompts of one engine, oldest first. A lone one takes as long as its curve gives."""

    prompts: list[EnginePrompt] = field(default_factory=list)

    @property
    def leader(self) -> int:
        """The oldest request."""
        return self.prompts[0].request

    @property
    def requests(self) -> Sequence[int]:
        """The requests of all prompts, oldest first."""
        return [each.request for each in self.prompts]

    def start_step(
        self, limits: StepLimits, curve: Curve, joining: Callable[[float], EnginePrompt | None]
    ) -> float:
        """Fill a step; return its seconds.

        `joining` returns the next prompt that waits, if its turn is before the one given.
        """
        budget = float(limits.tokens)

        def join(before: float) -> None:
            nonlocal budget
            while budget > 0.0 and len(self.prompts) < limits.prompts:
                joined = joining(before)
                if joined is None:
                    return
                self.prompts.append(joined)
                budget -= _take(joined, budget)

        if limits.shortest_first:
            for prompt in sorted(self.prompts, key=lambda each: each.turn):
                join(prompt.turn)
                budget -= _take(prompt, budget)
        else:
            for prompt in self.prompts:
                budget -= _take(prompt, budget)
        join(inf)
        return _seconds(self.prompts, curve)

    def end_step(self) -> list[int]:
        """End the step; return the requests that it completed."""
        for prompt in self.prompts:
            prompt.done += prompt.chunk
            prompt.computed += prompt.chunk
            prompt.left -= prompt.chunk
            prompt.is_new = prompt.is_new and prompt.chunk == 0.0
        completed = [each.request for each in self.prompts if each.left <= 0.0]
        self.prompts = [each for each in self.prompts if each.left > 0.0]
        return completed


def _take(prompt: EnginePrompt, budget: float) -> float:
    prompt.chunk = min(prompt.left, budget)
    return prompt.chunk


def _seconds(prompts: Sequence[EnginePrompt], curve: Curve) -> float:
    """Return the constant once for all that start together, plus every chunk's own part."""
    base_s = curve.base_s if any(each.is_new and each.chunk > 0.0 for each in prompts) else 0.0
    return base_s + sum(curve.seconds(each.chunk, each.done) - curve.base_s for each in prompts)
