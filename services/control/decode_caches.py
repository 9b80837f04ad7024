"""Predicts what of a prompt the decode engines hold: the turns before it, and their answers.

Pure. Only a decode engine has the KV of an answer, so that the next turn of a conversation finds
more of itself there than in the prefill pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from ..core.prefix_digests import digests_of, extend_digests, kept_digests
from ..core.types import PrefilledBy, PromptMode, Report, Request, Selection, Span
from .prefixes import SMOOTHING, PrefixMemory

FORGETTING = 0.02  # per prompt that was not tried: how fast misses are forgotten


class DecodeCaches:
    """One gateway's forecast, weighted by how often it was right.

    It knows the conversations that went through this gateway. Of others it knows what the
    speculator says: tokens that were carried over were decoded somewhere. Replicas evict, and the
    router may choose another one: how far the forecast is right is learnt.
    """

    def __init__(self, max_blocks: int) -> None:
        self._memory = PrefixMemory(max_blocks)
        self._trust = 1.0

    def cached_tokens(self, request: Request, selection: Selection) -> int:
        """Return how many of the kept tokens are expected in the engine that will decode."""
        return int(self._trust * self._foreseen(request, selection))

    def dense_tokens(self, digests: Sequence[int], tokens: int) -> int:
        """Return the same for a prompt of `tokens` tokens that would be kept whole."""
        return int(self._trust * self._memory.longest_match(digests, tokens))

    def learn(
        self, request: Request, selection: Selection, report: Report, answer: Sequence[int]
    ) -> None:
        """Learn from a finished request; `answer` holds the output tokens of its first sample."""
        if selection.mode is PromptMode.TEXT:
            return
        foreseen = self._foreseen(request, selection)
        if report.prefilled_by is PrefilledBy.DECODE:
            if foreseen > 0:
                right = min(1.0, report.cached_tokens / foreseen)
                self._trust += SMOOTHING * (right - self._trust)
        elif len(answer) <= 1:
            return  # prefill's token was the whole answer: nothing was decoded
        elif foreseen > 0:  # it was not tried: without this, it never would be again
            self._trust += FORGETTING * (1.0 - self._trust)
        digests = extend_digests(digests_of(request), request, answer)
        held = selection.kept_tokens + max(0, len(answer) - 1)  # the last token was never computed
        self._memory.remember(kept_digests(digests, _runs_with(selection, len(answer))), held)

    def _foreseen(self, request: Request, selection: Selection) -> int:
        """Count what should be cached. A prompt as text is another one: nothing."""
        if selection.mode is PromptMode.TEXT:
            return 0
        digests = kept_digests(digests_of(request), selection.runs)
        known = self._memory.longest_match(digests, selection.kept_tokens)
        return max(known, selection.carried_tokens)


def _runs_with(selection: Selection, answer_tokens: int) -> tuple[Span, ...]:
    """Return the kept runs and the answer, which follows the prompt."""
    *before, last = selection.runs
    end = selection.prompt_tokens + answer_tokens
    if last.stop == selection.prompt_tokens:
        return (*before, Span(last.start, end))
    return (
        (*selection.runs, Span(selection.prompt_tokens, end)) if answer_tokens else selection.runs
    )
