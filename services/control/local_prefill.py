"""Chooses prompts that the decode engine computes itself: nothing is handed over then.

A hand-over costs the calls to the prefill pool and the KV transfer, which is much of the time to
first token where little is to be computed: of a short prompt, and of the next turn of a
conversation, whose earlier turns and answers the decode engine has. A prefill in a decode engine
delays the answers that it is streaming by one step. So the rule takes short dense prompts and turns
with little new text, and only where nobody waits or the delay is small. Other systems call it
conditional disaggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..core.types import PlanKind, Report, Request, Selection
from .decode_caches import DecodeCaches
from .stages import StageCurves


class EveryPromptLocal:
    """The rule where the model's KV cannot be handed over."""

    @contextmanager
    def decide(self, request: Request, selection: Selection) -> Iterator[bool]:
        """Yield True."""
        del request, selection
        yield True

    def learn(
        self, request: Request, selection: Selection, report: Report, answer: Sequence[int]
    ) -> None:
        """Learn nothing."""


@dataclass(frozen=True, slots=True)
class LocalLimits:
    """The most tokens that a decode engine computes of a prompt."""

    prompt_tokens: int  # of a dense one
    turn_tokens: int  # of one that it has most of


class LocalPrefillRule:
    """The rule, and its count of this gateway's running requests."""

    def __init__(
        self, limits: LocalLimits, curves: Callable[[], StageCurves], caches: DecodeCaches
    ) -> None:
        self._limits = limits
        self._curves = curves
        self._caches = caches
        self._running = 0

    @contextmanager
    def decide(self, request: Request, selection: Selection) -> Iterator[bool]:
        """Yield True if decode computes this prompt; inside, the request counts as running."""
        local = self._is_local(request, selection)
        self._running += 1
        try:
            yield local
        finally:
            self._running -= 1

    def learn(
        self, request: Request, selection: Selection, report: Report, answer: Sequence[int]
    ) -> None:
        """Learn what the decode engine of a finished request has cached."""
        self._caches.learn(request, selection, report, answer)

    def _is_local(self, request: Request, selection: Selection) -> bool:
        if request.samples > 1 or request.prompt_logprobs:  # the prefill pool's job
            return False
        tokens = selection.engine_tokens
        cached = min(tokens - 1, self._caches.cached_tokens(request, selection))
        if not self._is_short(selection) and not self._is_next_turn(tokens, cached):
            return False
        return self._running == 0 or self._is_cheap(tokens, cached)

    def _is_short(self, selection: Selection) -> bool:
        dense = selection.plan.kind is PlanKind.DENSE
        return dense and selection.kept_tokens <= self._limits.prompt_tokens

    def _is_next_turn(self, tokens: int, cached: int) -> bool:
        return 2 * cached >= tokens and tokens - cached <= self._limits.turn_tokens

    def _is_cheap(self, tokens: int, cached: int) -> bool:
        """Return True if computing the prompt takes no longer than pulling its KV."""
        curves = self._curves()
        take_over_s = curves.transfer.seconds(tokens) + curves.first_decode.seconds(tokens)
        return curves.prefill.seconds(tokens - cached, cached) <= take_over_s
