"""Prune or dense, and why."""

import pytest

from specprefill.core.errors import InvalidRequest
from specprefill.core.plan import Planner, PromptModes
from specprefill.core.types import Controls, KeepRange, PlanKind, PromptMode, Reason, Request

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
def test_dense_plans_have_a_reason(controls, tokens, reason):
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


AUTO = Planner(enabled=True, keep=None, min_prompt_tokens=1000, floor=0.1, ceiling=0.8)


@pytest.mark.parametrize(
    ("controls", "planner", "floor", "ceiling"),
    [
        (Controls(auto=True), PLANNER, 0.05, 1.0),
        (Controls(), AUTO, 0.1, 0.8),
        (Controls(floor=0.2, ceiling=0.4), AUTO, 0.2, 0.4),
        (Controls(floor=0.9), AUTO, 0.9, 0.9),
    ],
)
def test_the_scores_choose_between_floor_and_ceiling(controls, planner, floor, ceiling):
    got = plan(controls, planner=planner)
    assert (got.kind, got.reason) == (PlanKind.PRUNE, Reason.AUTO)
    assert got.within == KeepRange(floor, ceiling)


def test_a_rate_goes_before_the_automatic_one():
    got = plan(Controls(keep=0.3), planner=AUTO)
    assert (got.reason, got.keep, got.within) == (Reason.ASKED, 0.3, None)


def test_a_ceiling_lowers_the_default_rate():
    assert plan(Controls(ceiling=0.2)).keep == 0.2


def test_nothing_to_choose_is_dense():
    assert plan(Controls(auto=True, floor=1.0)).reason is Reason.KEEP_IS_ONE
    assert plan(Controls(auto=True), tokens=999).reason is Reason.SHORT_PROMPT


def test_asking_for_the_automatic_rate_is_asking_for_pruning():
    planner = Planner(enabled=False, keep=0.3, min_prompt_tokens=1000)
    assert plan(Controls(auto=True), planner=planner).reason is Reason.AUTO


def test_a_rate_for_a_short_prompt_is_obeyed():
    assert plan(Controls(keep=0.5), tokens=100).kind is PlanKind.PRUNE


def test_prompt_logprobs_need_every_token():
    assert plan(prompt_logprobs=True).reason is Reason.PROMPT_LOGPROBS


def test_a_deployment_can_prune_on_request_only():
    planner = Planner(enabled=False, keep=0.3, min_prompt_tokens=1000)
    assert plan(planner=planner).reason is Reason.DISABLED
    assert plan(Controls(prune=True), planner=planner).kind is PlanKind.PRUNE


TEXT_ONLY = PromptModes(PromptMode.TEXT, (PromptMode.TEXT,), "recurrent layers")
DENSE_ONLY = PromptModes(PromptMode.DENSE, (), "selection.mode is dense")


@pytest.mark.parametrize(
    ("asked", "modes", "mode"),
    [
        (None, PromptModes(), PromptMode.POSITIONS),
        (PromptMode.TEXT, PromptModes(), PromptMode.TEXT),
        (None, TEXT_ONLY, PromptMode.TEXT),
        (PromptMode.POSITIONS, PromptModes(PromptMode.TEXT), PromptMode.POSITIONS),
    ],
)
def test_the_callers_mode_comes_before_the_usual_one(asked, modes, mode):
    planner = Planner(enabled=True, keep=0.3, min_prompt_tokens=1000, modes=modes)
    got = plan(Controls(mode=asked), planner=planner)
    assert (got.kind, got.mode) == (PlanKind.PRUNE, mode)


@pytest.mark.parametrize("controls", [Controls(), Controls(prune=True), Controls(keep=0.1)])
def test_a_dense_mode_prunes_nothing_whoever_asks(controls):
    planner = Planner(enabled=True, keep=0.3, min_prompt_tokens=1000, modes=DENSE_ONLY)
    got = plan(controls, planner=planner)
    assert (got.kind, got.reason) == (PlanKind.DENSE, Reason.DENSE_MODE)


@pytest.mark.parametrize(
    ("modes", "message"),
    [
        (TEXT_ONLY, 'x.mode: must be "text" here, not "positions": recurrent layers'),
        (DENSE_ONLY, 'x.mode: must be absent here, not "positions": selection.mode is dense'),
    ],
)
def test_a_mode_that_is_not_offered_is_refused(modes, message):
    with pytest.raises(InvalidRequest) as refused:
        modes.check(Controls(mode=PromptMode.POSITIONS), "x.mode")
    assert (refused.value.message, refused.value.field) == (message, "x.mode")
    modes.check(Controls(), "x.mode")
