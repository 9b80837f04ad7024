"""Chooses prompts that the decode engine computes itself: nothing is handed over then.

A hand-over costs the calls to the prefill pool and the KV transfer, which for a short prompt is
much of its time to first token. A prefill in a decode engine delays the answers that it is
streaming by one step. So the rule takes only short dense prompts, and only where nobody waits or
the delay is small. Other systems call it conditional disaggregation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..core.types import PlanKind, Request, Selection
from .stages import StageCurves


class EveryPromptLocal:
    """The rule where the model's KV cannot be handed over."""

    @contextmanager
    def decide(self, request: Request, selection: Selection) -> Iterator[bool]:
        """Yield True."""
        del request, selection
        yield True


class LocalPrefillRule:
    """The rule, and its count of this gateway's running requests."""

    def __init__(self, max_tokens: int, curves: Callable[[], StageCurves]) -> None:
        self._max_tokens = max_tokens
        self._curves = curves
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

    def _is_local(self, request: Request, selection: Selection) -> bool:
        if not self._fits(request, selection):
            return False
        return self._running == 0 or self._is_cheap(selection.kept_tokens)

    def _fits(self, request: Request, selection: Selection) -> bool:
        """Return True for a short dense prompt, one sample, no prompt logprobs (prefill's job)."""
        dense = selection.plan.kind is PlanKind.DENSE
        plain = request.samples == 1 and not request.prompt_logprobs
        return dense and plain and selection.kept_tokens <= self._max_tokens

    def _is_cheap(self, tokens: int) -> bool:
        """Return True if computing the prompt takes no longer than pulling its KV."""
        curves = self._curves()
        take_over_s = curves.transfer.seconds(tokens) + curves.first_decode.seconds(tokens)
        return curves.prefill.seconds(tokens) <= take_over_s
