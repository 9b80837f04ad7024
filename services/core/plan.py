"""Decides whether to prune a prompt, and how far. Pure: request and policy in, plan out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from .errors import InvalidRequest
from .types import (
    Controls,
    KeepRange,
    Plan,
    PlanKind,
    PromptMode,
    Reason,
    Request,
    TtftEstimate,
)

# The share of its self-test's facts that a draft must keep. By chance it keeps one in seven;
# five or more of eight once in 500 tests.
LEAST_FACTS_KEPT = 0.6


class Gain(Protocol):
    """Estimates what a plan costs."""

    def estimate(self, request: Request, keep: float | None) -> TtftEstimate:
        """Estimate the seconds to the first token, dense and pruned to `keep` (None: automatic)."""
        ...


@dataclass(frozen=True, slots=True)
class PromptModes:
    """The forms in which a deployment sends what is kept of a prompt."""

    usual: PromptMode = PromptMode.POSITIONS  # DENSE: no prompt is pruned
    offered: tuple[PromptMode, ...] = (PromptMode.POSITIONS, PromptMode.TEXT)
    reason: str = ""  # why the others are not offered

    def check(self, controls: Controls, field: str) -> None:
        """Raise InvalidRequest, naming `field`, if the caller asked for a form not offered."""
        if controls.mode is None or controls.mode in self.offered:
            return
        offered = " or ".join(f'"{mode}"' for mode in self.offered) or "absent"
        message = f'{field}: must be {offered} here, not "{controls.mode}": {self.reason}'
        raise InvalidRequest(message, field)


EVERY_MODE = PromptModes()


@dataclass(frozen=True, slots=True)
class Planner:
    """The deployment's policy; a request's own controls override it."""

    enabled: bool  # prune unless asked not to
    keep: float | None  # default keep rate; None: the scores choose, from `floor` to `ceiling`
    min_prompt_tokens: int  # below it a dense prefill is at least as fast
    floor: float = 0.05
    ceiling: float = 1.0
    gain: Gain | None = None  # None: prune whether it pays or not
    unfit: Callable[[], bool] | None = None  # returns True if the draft is known to choose badly
    min_gain: float = 0.0  # least share of the dense time to first token that pruning must save
    modes: PromptModes = EVERY_MODE

    def with_plan(self, request: Request) -> Request:
        """Return the request with its plan, made now unless it has one."""
        return request if request.plan is not None else replace(request, plan=self.plan(request))

    def plan(self, request: Request) -> Plan:
        """Choose prune or dense for `request`, with the reason."""
        refusal = self.dense_reason(request)
        if refusal is not None:
            return Plan(PlanKind.DENSE, refusal)
        plan = replace(self._pruning_plan(request.controls), mode=self._mode(request.controls))
        if plan.kind is PlanKind.DENSE or self.gain is None:
            return plan
        keep = plan.keep if plan.within is None else None
        expected = self.gain.estimate(request, keep)
        if not is_asked(request.controls) and not self._is_worthwhile(expected):
            return Plan(PlanKind.DENSE, Reason.NO_GAIN, expected=expected)
        return replace(plan, expected=expected)

    def _pruning_plan(self, controls: Controls) -> Plan:
        """Return the plan to prune: at a fixed rate, or with bounds for an automatic one."""
        keep = self.keep if controls.keep is None else controls.keep
        if controls.auto or keep is None:
            floor = self.floor if controls.floor is None else controls.floor
            ceiling = self.ceiling if controls.ceiling is None else controls.ceiling
            if floor >= 1.0:
                return Plan(PlanKind.DENSE, Reason.KEEP_IS_ONE)
            within = KeepRange(floor, max(floor, ceiling))
            return Plan(PlanKind.PRUNE, Reason.AUTO, within=within)
        if controls.ceiling is not None:
            keep = min(keep, controls.ceiling)
        if controls.floor is not None:
            keep = max(keep, controls.floor)
        if keep >= 1.0:
            return Plan(PlanKind.DENSE, Reason.KEEP_IS_ONE)
        return Plan(PlanKind.PRUNE, Reason.ASKED if is_asked(controls) else Reason.DEFAULT, keep)

    def _mode(self, controls: Controls) -> PromptMode:
        return self.modes.usual if controls.mode is None else controls.mode

    def _is_worthwhile(self, expected: TtftEstimate) -> bool:
        return expected.is_trial or expected.prune_s < expected.dense_s * (1.0 - self.min_gain)

    def dense_reason(self, request: Request) -> Reason | None:
        """Return why the prompt is dense whatever it holds; None: it may be pruned."""
        controls = request.controls
        if controls.prune is False:
            return Reason.ASKED_OFF
        if request.prompt_logprobs:
            return Reason.PROMPT_LOGPROBS
        if self._mode(controls) is PromptMode.DENSE:
            return Reason.DENSE_MODE
        if not self.enabled and not (is_asked(controls) or controls.auto):
            return Reason.DISABLED
        # Asking for pruning does not make a short prompt worth it; asking for a rate does.
        if controls.keep is None and len(request.prompt) < self.min_prompt_tokens:
            return Reason.SHORT_PROMPT
        if self.unfit is not None and self.unfit() and not is_asked(controls):
            return Reason.SPECULATOR_UNFIT
        return None


def is_asked(controls: Controls) -> bool:
    """Return True if the caller asked for pruning, which then overrides the estimate."""
    return controls.prune is True or controls.keep is not None


def can_choose(facts_kept: float | None) -> bool:
    """Return True if a draft with this self-test result may choose; None: it was not tested."""
    return facts_kept is None or facts_kept >= LEAST_FACTS_KEPT


def plan_of(request: Request) -> Plan:
    """Return the plan that a request carries. Raises ValueError for one that was not planned."""
    if request.plan is None:
        raise ValueError(f"request {request.request_id}: not planned")
    return request.plan
