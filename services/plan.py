"""Whether to prune a prompt, and how far. Pure: a request and a policy in, a plan out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from .types import Controls, Expected, Plan, PlanKind, Reason, Request


class Gain(Protocol):
    """Foresees what a plan costs."""

    def expected(self, request: Request, keep: float) -> Expected:
        """Seconds to the first token, pruned to `keep` and dense."""
        ...


@dataclass(frozen=True, slots=True)
class Planner:
    """The deployment's policy; a request's own controls go before it."""

    enabled: bool  # prune unless asked not to
    keep: float  # default keep rate
    min_prompt_tokens: int  # below it a dense prefill is at least as fast
    gain: Gain | None = None  # None: prune whether it pays or not
    min_gain: float = 0.0  # least share of the dense time to first token that pruning must save

    def plan(self, request: Request) -> Plan:
        """Choose prune or dense for `request`, with the reason."""
        refusal = self._dense_reason(request)
        if refusal is not None:
            return Plan(PlanKind.DENSE, refusal)
        keep = self._keep(request.controls)
        if keep >= 1.0:
            return Plan(PlanKind.DENSE, Reason.KEEP_IS_ONE)
        expected = None if self.gain is None else self.gain.expected(request, keep)
        if _asked(request.controls):
            return Plan(PlanKind.PRUNE, Reason.ASKED, keep, expected)
        if expected is not None and not self._pays(expected):
            return Plan(PlanKind.DENSE, Reason.NO_GAIN, expected=expected)
        return Plan(PlanKind.PRUNE, Reason.DEFAULT, keep, expected)

    def _keep(self, controls: Controls) -> float:
        keep = self.keep if controls.keep is None else controls.keep
        return keep if controls.floor is None else max(keep, controls.floor)

    def _pays(self, expected: Expected) -> bool:
        return expected.prune_s < expected.dense_s * (1.0 - self.min_gain)

    def _dense_reason(self, request: Request) -> Reason | None:
        controls = request.controls
        if controls.prune is False:
            return Reason.ASKED_OFF
        if request.prompt_logprobs:
            return Reason.PROMPT_LOGPROBS
        if not self.enabled and not _asked(controls):
            return Reason.DISABLED
        # Asking for pruning does not make a short prompt worth it; asking for a rate does.
        if controls.keep is None and len(request.prompt) < self.min_prompt_tokens:
            return Reason.SHORT_PROMPT
        return None


def _asked(controls: Controls) -> bool:
    return controls.prune is True or controls.keep is not None
