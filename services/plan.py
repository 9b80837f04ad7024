"""Whether to prune a prompt, and how far. Pure: a request and a policy in, a plan out."""

from __future__ import annotations

from dataclasses import dataclass

from .types import Controls, Plan, PlanKind, Reason, Request


@dataclass(frozen=True, slots=True)
class Planner:
    """The deployment's policy; a request's own controls go before it."""

    enabled: bool  # prune unless asked not to
    keep: float  # default keep rate
    min_prompt_tokens: int  # below it a dense prefill is at least as fast

    def plan(self, request: Request) -> Plan:
        """Choose prune or dense for `request`, with the reason."""
        refusal = self._dense_reason(request)
        if refusal is not None:
            return Plan(PlanKind.DENSE, refusal)
        controls = request.controls
        keep = self.keep if controls.keep is None else controls.keep
        if controls.floor is not None:
            keep = max(keep, controls.floor)
        if keep >= 1.0:
            return Plan(PlanKind.DENSE, Reason.KEEP_IS_ONE)
        reason = Reason.ASKED if _asked(controls) else Reason.DEFAULT
        return Plan(PlanKind.PRUNE, reason, keep)

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
