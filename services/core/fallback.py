"""The fallback for a prompt that the speculator could not score in time.

It is not a dense prefill, unless a deployment chooses that: a dense prompt is 1 / keep times the
work of a pruned one, for a pool that was sized for pruned ones, at the very moment of overload.
Pure: no clock, no I/O.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from .chunks import Chunks
from .errors import Overloaded
from .selection import SelectionPolicy, select
from .types import Plan, Reason, Request, Selection, dense_selection
from .words import word_scores

NOMINAL_KEEP = 0.3  # of a plan whose rate the scores would have chosen
_MESSAGES = {
    Reason.SPECULATOR_OVERLOADED: "the speculator pool is full",
    Reason.SPECULATOR_TIMEOUT: "the prompt could not be scored in time",
}


class OnOverload(enum.StrEnum):
    """The policies for a prompt without scores."""

    SHED = "shed"  # 429, with a time to try again
    STATIC = "static"  # pruned at the nominal rate, chosen by the query's words
    DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Patience:
    """The time that scoring a prompt may take, queueing included."""

    base_s: float = 10.0
    token_s: float = 0.0

    def seconds(self, tokens: int) -> float:
        """Return the limit for a prompt of `tokens` tokens."""
        return self.base_s + self.token_s * tokens


@dataclass(frozen=True, slots=True)
class Fallback:
    """A deployment's policy for prompts without scores."""

    on_overload: OnOverload = OnOverload.SHED
    policy: SelectionPolicy | None = None  # of the static selection

    def __post_init__(self) -> None:
        if self.on_overload is OnOverload.STATIC and self.policy is None:
            raise ValueError("fallback: a static selection needs a policy")

    def selection(
        self, request: Request, plan: Plan, reason: Reason, retry_after_s: float
    ) -> Selection:
        """Return the selection without scores. Raises Overloaded where the policy is to shed."""
        match self.on_overload:
            case OnOverload.DENSE:
                return dense_selection(len(request.prompt), reason)
            case OnOverload.STATIC if self.policy is not None:
                static = replace(plan, reason=reason, keep=_nominal_keep(plan), within=None)
                return static_selection(request, static, self.policy)
            case _:
                message = f"{_MESSAGES[reason]}; try again later"
                raise Overloaded(message, retry_after_s, reason.value)


def static_selection(request: Request, plan: Plan, policy: SelectionPolicy) -> Selection:
    """Keep what is always kept, and the chunks that share most words with the query.

    See `words.word_scores`. It reads no model, and takes milliseconds.
    """
    chunks = Chunks.of_equal_length(len(request.prompt), policy.chunk_tokens)
    scores = word_scores(
        request.prompt, request.asked, request.protected, policy.tail_tokens, chunks
    )
    return select(scores, plan, request.protected, policy)


def _nominal_keep(plan: Plan) -> float:
    if plan.within is None:
        return plan.keep
    return min(plan.within.ceiling, max(plan.within.floor, NOMINAL_KEEP))
