"""Prune or dense, and why."""

import pytest

from specprefill.plan import Planner
from specprefill.types import Controls, PlanKind, Reason, Request

PLANNER = Planner(enabled=True, keep=0.3, min_prompt_tokens=1000)


def plan(controls=None, tokens=2000, planner=PLANNER, **fields):
    request = Request("r", (1,) * tokens, b"", controls=controls or Controls(), **fields)
    return planner.plan(request)


@pytest.mark.parametrize(
    ("controls", "tokens", "reason"),
    [
        (Controls(prune=False), 2000, Reason.ASKED_OFF),
        (Controls(prune=False, keep=0.1), 2000, Reason.ASKED_OFF),
        (Controls(), 999, Reason.SHORT_PROMPT),
        (Controls(prune=True), 999, Reason.SHORT_PROMPT),
        (Controls(keep=1.0), 2000, Reason.KEEP_IS_ONE),
        (Controls(floor=1.0), 2000, Reason.KEEP_IS_ONE),
    ],
)
def test_dense_plans_say_why(controls, tokens, reason):
    got = plan(controls, tokens)
    assert (got.kind, got.reason) == (PlanKind.DENSE, reason)


@pytest.mark.parametrize(
    ("controls", "keep", "reason"),
    [
        (Controls(), 0.3, Reason.DEFAULT),
        (Controls(prune=True), 0.3, Reason.ASKED),
        (Controls(keep=0.1), 0.1, Reason.ASKED),
        (Controls(keep=0.1, floor=0.2), 0.2, Reason.ASKED),
        (Controls(floor=0.5), 0.5, Reason.DEFAULT),
    ],
)
def test_prune_plans_carry_the_rate(controls, keep, reason):
    got = plan(controls)
    assert (got.kind, got.keep, got.reason) == (PlanKind.PRUNE, keep, reason)


def test_a_rate_for_a_short_prompt_is_obeyed():
    assert plan(Controls(keep=0.5), tokens=100).kind is PlanKind.PRUNE


def test_prompt_logprobs_need_every_token():
    assert plan(prompt_logprobs=True).reason is Reason.PROMPT_LOGPROBS


def test_a_deployment_can_prune_on_request_only():
    planner = Planner(enabled=False, keep=0.3, min_prompt_tokens=1000)
    assert plan(planner=planner).reason is Reason.DISABLED
    assert plan(Controls(prune=True), planner=planner).kind is PlanKind.PRUNE
