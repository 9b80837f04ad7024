"""What admission control knows of a request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..core.types import Plan, PlanKind, Request, TtftEstimate
from .admission import AdmissionRequest

_BELOW_DENSE = 0.999  # the highest keep rate of a plan whose rate the scores choose


@dataclass(frozen=True, slots=True)
class RequestSummary:
    """A request without its prompt: small enough to send to another process."""

    prompt_tokens: int
    plan: Plan
    floor: float  # the lowest keep rate that its caller and the deployment allow
    timeout_s: float  # left for its first token
    key: str | None = None  # the API key's name
    priority: int = 0  # lower goes first
    is_prefilled: bool = True  # False: only its selection is wanted
    samples: int = 1

    @classmethod
    def of(
        cls, request: Request, plan: Plan, keep_floor: float, *, is_prefilled: bool = True
    ) -> Self:
        """Describe `request`; `keep_floor` bounds plans that name no floor and no rate."""
        return cls(
            len(request.prompt),
            plan,
            _floor(request, plan, keep_floor),
            request.timeout_s,
            request.key,
            request.priority,
            is_prefilled,
            request.samples,
        )

    def admission_request(self) -> AdmissionRequest:
        """Return the question that the admission rules answer."""
        expected = self.plan.expected or TtftEstimate(0.0, 0.0)
        if self.plan.kind is PlanKind.DENSE:
            cached = expected.dense_cached_tokens
            return AdmissionRequest(self.prompt_tokens, 1.0, 1.0, self.timeout_s, cached)
        keep = min(self.plan.highest_keep, _BELOW_DENSE)
        return AdmissionRequest(
            self.prompt_tokens,
            keep,
            min(keep, self.floor),
            self.timeout_s,
            expected.prune_cached_tokens,
            expected.remembered_tokens,
        )


def _floor(request: Request, plan: Plan, keep_floor: float) -> float:
    """Return the caller's floor; a requested keep rate is one, too."""
    controls = request.controls
    if controls.floor is not None:
        return controls.floor
    if plan.within is not None:
        return plan.within.floor
    return keep_floor if controls.keep is None else controls.keep
