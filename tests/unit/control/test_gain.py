"""The estimate whether pruning pays, from learnt times."""

from __future__ import annotations

from dataclasses import replace

import pytest

from specprefill.control.decode_caches import DecodeCaches
from specprefill.control.gain import NetGain
from specprefill.control.prefixes import CacheForecast, PrefixMemory
from specprefill.control.stages import Curve, StageCurves, StageModels
from specprefill.core.plan import Planner
from specprefill.core.types import (
    UNSCORED,
    Controls,
    Plan,
    PlanKind,
    PrefilledBy,
    Reason,
    Report,
    Request,
    Span,
    dense_selection,
)
from tests.policies import PAPER

CURVES = StageCurves(
    speculate=Curve(base_s=0.05, token_s=1e-5),
    prefill=Curve(base_s=0.01, token_s=1e-4),
    transfer=Curve(),
    first_decode=Curve(),
)
POLICY = replace(PAPER, min_kept_tokens=64)


def gain() -> NetGain:
    caches = (CacheForecast(PrefixMemory(1000)) for _ in range(2))
    return NetGain(StageModels(CURVES), *caches, POLICY)


def planner(of: NetGain, min_gain: float = 0.05) -> Planner:
    return Planner(enabled=True, keep=0.2, min_prompt_tokens=1, gain=of, min_gain=min_gain)


def request(tokens: int, seed: int = 0, controls: Controls | None = None, **fields) -> Request:
    prompt = tuple((seed * 7919 + i) % 50_000 for i in range(tokens))
    return Request("r", prompt, b"", controls=controls or Controls(), **fields)


def report(kind: PlanKind = PlanKind.DENSE, **changes) -> Report:
    fields = {
        "plan": kind,
        "reason": Reason.DEFAULT,
        "prompt_tokens": 10_000,
        "kept_tokens": 10_000,
        "keep_rate": 1.0,
        "queue_s": 0.0,
        "speculate_s": 0.0,
        "prefill_s": 0.0,
        "transfer_s": 0.0,
        "first_decode_s": 0.0,
        "ttft_s": 0.0,
    }
    return Report(**{**fields, **changes})


def test_a_long_prompt_is_pruned_and_a_short_one_is_not():
    plan = planner(gain()).plan
    assert plan(request(10_000)).kind is PlanKind.PRUNE
    short = plan(request(400))
    assert (short.kind, short.reason) == (PlanKind.DENSE, Reason.NO_GAIN)


def test_the_plan_holds_the_estimate():
    expected = planner(gain()).plan(request(10_000)).expected
    assert expected.dense_s == pytest.approx(1.01, rel=0.02)
    assert expected.prune_s == pytest.approx(0.15 + 0.21, rel=0.02)


def test_a_cached_prompt_goes_dense():
    known = gain()
    known.learn(request(10_000), report())
    plan = planner(known).plan(request(10_000))
    assert plan.reason is Reason.NO_GAIN
    assert plan.expected.dense_s < 0.03
    assert planner(known).plan(request(10_000, seed=1)).kind is PlanKind.PRUNE


def test_a_pruned_prompt_warms_its_protected_prefix_only():
    known = gain()
    asked = request(10_000, protected=(Span(0, 1000), Span(9000, 10_000)))
    known.learn(asked, report(PlanKind.PRUNE, kept_tokens=2000))
    plan = planner(known).plan(asked)
    assert plan.kind is PlanKind.PRUNE
    assert plan.expected.dense_s == pytest.approx(0.01 + 1e-4 * (10_000 - 992), rel=0.05)


def test_the_next_turn_of_a_pruned_conversation_costs_its_new_tokens():
    known = gain()
    asked = request(10_000)
    known.learn(asked, report(PlanKind.PRUNE, kept_tokens=2000))
    turn = replace(asked, prompt=(*asked.prompt, *range(200)))
    expected = planner(known).plan(turn).expected
    unread_s = CURVES.speculate.seconds(10_200)
    assert expected.prune_s == pytest.approx(unread_s + CURVES.prefill.seconds(200), rel=0.1)
    other = replace(asked, prompt=(5, *turn.prompt[1:]))
    assert planner(known).plan(other).expected.prune_s > expected.prune_s + 0.1


def test_a_turn_that_decode_computed_is_continued_as_one_of_the_prefill_pool():
    known = gain()
    asked = request(10_000)
    turned = report(PlanKind.PRUNE, kept_tokens=2000, prefilled_by=PrefilledBy.DECODE)
    known.learn(asked, turned)
    expected = planner(known).plan(replace(asked, prompt=(*asked.prompt, *range(200)))).expected
    unread_s = CURVES.speculate.seconds(10_200)
    assert expected.prune_s == pytest.approx(unread_s + CURVES.prefill.seconds(200), rel=0.1)


def test_a_dense_conversation_that_decode_has_is_not_pruned():
    caches = (CacheForecast(PrefixMemory(1000)) for _ in range(2))
    held = DecodeCaches(1000)
    known = NetGain(StageModels(CURVES), *caches, POLICY, held)
    asked = request(10_000)
    assert planner(known).plan(asked).kind is PlanKind.PRUNE
    held.learn(asked, dense_selection(10_000, Reason.NO_GAIN), report(), [1] * 200)
    turn = replace(asked, prompt=(*asked.prompt, *[1] * 200, *range(100)))
    assert planner(known).plan(turn).reason is Reason.NO_GAIN


def test_protection_that_leaves_little_to_drop_goes_dense():
    asked = request(4000, protected=(Span(0, 3800),))
    assert planner(gain()).plan(asked).reason is Reason.NO_GAIN


def test_caches_that_miss_are_not_counted_on():
    known = gain()
    for seed in range(40):
        known.learn(request(10_000, seed), report())
        known.learn(request(10_000, seed), report())  # cached_tokens=0: the cache missed
    assert planner(known).plan(request(10_000, 39)).kind is PlanKind.PRUNE


def test_a_speculator_that_became_slow_stops_pruning():
    known = gain()
    for _ in range(20):
        slow = report(
            PlanKind.PRUNE, kept_tokens=2000, speculate_s=5.0, prefill_s=0.21, ttft_s=5.22
        )
        known.learn(request(10_000), slow)
    assert planner(known).plan(request(10_000)).reason is Reason.NO_GAIN


def test_a_prompt_that_the_speculator_remembers_is_cheap_to_score():
    known = gain()
    first = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.36)
    known.learn(request(10_000), first)
    again = replace(first, speculate_s=0.051, remembered_tokens=9984, ttft_s=0.261)
    for _ in range(9):
        known.learn(request(10_000), again)
    assert known.estimate(request(10_000), 0.2).prune_s == pytest.approx(0.27, rel=0.1)
    assert known.estimate(request(10_000, seed=1), 0.2).prune_s == pytest.approx(0.36, rel=0.1)


def test_the_estimate_holds_what_caches_should_have():
    known = gain()
    first = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.36)
    known.learn(request(10_000), first)
    assert known.estimate(request(10_000), 0.2).remembered_tokens == 9984  # whole blocks
    assert known.estimate(request(10_000, seed=1), 0.2).remembered_tokens == 0
    known.learn(request(10_000, seed=2), report(prefill_s=1.0, ttft_s=1.01))
    assert known.estimate(request(10_000, seed=2), 0.2).dense_cached_tokens == 9984


def test_overheads_of_pruning_count():
    known = gain()
    for _ in range(20):
        slow = report(
            PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=2.0
        )
        known.learn(request(10_000), slow)
    expected = known.estimate(request(10_000), 0.2)
    assert expected.prune_s == pytest.approx(2.0, rel=0.05)
    assert expected.dense_s == pytest.approx(1.01, rel=0.05)


def test_the_way_to_the_speculator_is_no_overhead_of_prompts_that_it_does_not_see():
    known = gain()
    for seed in range(20):  # 2 s on the way to the speculator and back, and all was sent
        scored = report(reason=Reason.UNCERTAIN, speculate_s=0.15, prefill_s=1.01, ttft_s=3.16)
        known.learn(request(10_000, seed), scored)
    expected = known.estimate(request(10_000, 99), 0.2)
    assert expected.dense_s == pytest.approx(1.01, rel=0.05)
    assert expected.prune_s == pytest.approx(0.15 + 0.21 + 2.0, rel=0.05)


def test_answers_that_are_computed_again_count_as_costs_of_pruning():
    """As often as they were; what was discarded is no overhead of dense prompts."""
    known = gain()
    again = report(
        reason=Reason.UNSURE_ANSWER, speculate_s=0.15, prefill_s=1.01, discarded_s=3.0, ttft_s=4.16
    )
    pruned = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.36)
    plan = planner(known).plan(request(10_000, 99))
    assert plan.expected.prune_s == pytest.approx(0.36, rel=0.1)
    for seed in range(40):
        known.learn(request(10_000, seed), again if seed % 4 else pruned)
    plan = planner(known).plan(request(10_000, 99))
    assert plan.reason is Reason.NO_GAIN
    assert plan.expected.dense_s == pytest.approx(1.01, rel=0.1)
    assert plan.expected.prune_s == pytest.approx(0.36 + 0.75 * 1.01, rel=0.15)
    for seed in range(60):  # as the planner sends them from now on
        known.learn(request(10_000, seed), report(reason=Reason.NO_GAIN, prefill_s=1.0, ttft_s=1.0))
    assert planner(known).plan(request(10_000, 99)).kind is PlanKind.PRUNE


@pytest.mark.parametrize("controls", [Controls(prune=True), Controls(keep=0.3)])
def test_a_caller_who_asks_for_pruning_gets_it(controls: Controls):
    plan = planner(gain()).plan(request(400, controls=controls))
    assert (plan.kind, plan.reason) == (PlanKind.PRUNE, Reason.ASKED)
    assert plan.expected.dense_s < plan.expected.prune_s


def test_the_rates_that_the_scores_choose_are_learnt():
    known = gain()
    auto = Planner(enabled=True, keep=None, min_prompt_tokens=1, gain=known)
    assert auto.plan(request(10_000)).reason is Reason.AUTO
    for seed in range(60):
        dense = report(reason=Reason.UNCERTAIN, keep_rate=1.0, speculate_s=0.15)
        known.learn(request(10_000, seed), dense)
    assert auto.plan(request(10_000, 99)).reason is Reason.NO_GAIN
    for seed in range(60):
        known.learn(request(10_000, seed), report(reason=Reason.NO_GAIN, prefill_s=1.0))
    assert auto.plan(request(10_000, 99)).reason is Reason.AUTO


def test_a_saving_below_the_least_is_none():
    assert planner(gain(), min_gain=0.5).plan(request(10_000)).kind is PlanKind.PRUNE
    assert planner(gain(), min_gain=0.7).plan(request(10_000)).reason is Reason.NO_GAIN


def test_without_a_gain_every_prompt_is_pruned():
    plan = Planner(enabled=True, keep=0.2, min_prompt_tokens=1).plan(request(400))
    assert plan == Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.2)


GIVEN_UP = report(
    reason=Reason.SPECULATOR_TIMEOUT, queue_s=0.5, speculate_s=10.0, prefill_s=1.0, ttft_s=11.52
)


def test_scoring_in_vain_is_learnt_as_scoring_not_as_an_overhead_of_dense():
    known = gain()
    for _ in range(3):
        known.learn(request(10_000), GIVEN_UP)
    expected = known.estimate(request(10_000, seed=9), 0.2)
    assert expected.dense_s == pytest.approx(1.02, rel=0.05)
    assert expected.prune_s > 10.0


@pytest.mark.parametrize("scored_before", [0, 50])
def test_two_prompts_given_up_in_a_row_are_the_last_to_be_tried(scored_before: int):
    known = gain()
    scored = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.37)
    for seed in range(scored_before):
        known.learn(request(10_000, seed), scored)
    for seed in range(100, 102):
        known.learn(request(10_000, seed), GIVEN_UP)
    assert planner(known).plan(request(10_000, seed=103)).reason is Reason.NO_GAIN


def test_a_request_that_was_shed_teaches_the_same():
    known = gain()
    for seed in range(2):
        known.learn_unscored(request(10_000, seed), 10.0)
    assert planner(known).plan(request(10_000, seed=3)).reason is Reason.NO_GAIN


@pytest.mark.parametrize("waited_only", [report(reason=reason, queue_s=10.0, ttft_s=11.0)
                                         for reason in UNSCORED])  # fmt: skip
def test_a_full_queue_teaches_nothing_about_the_speed_of_scoring(waited_only: Report):
    known = gain()
    before = known.estimate(request(10_000, seed=9), 0.2)
    for seed in range(5):
        known.learn(request(10_000, seed), replace(waited_only, prefill_s=1.0))
        known.learn_unscored(request(10_000, seed), 0.0)
    after = known.estimate(request(10_000, seed=9), 0.2)
    assert after.prune_s == pytest.approx(before.prune_s, rel=0.1)
    assert after.dense_s == pytest.approx(before.dense_s, rel=0.1)


def test_one_outlier_is_not_believed():
    known = gain()
    scored = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.37)
    for seed in range(20):
        known.learn(request(10_000, seed), scored)
    known.learn(request(10_000, 21), GIVEN_UP)
    assert planner(known).plan(request(10_000, seed=22)).kind is PlanKind.PRUNE


def dense_until_pruned(known: NetGain, most: int = 5000) -> int:
    """Count the prompts that go dense until the speculator is tried again."""
    return until_tried(known, most)[0]


def until_tried(known: NetGain, most: int = 5000) -> tuple[int, Request]:
    """Count the prompts that go dense until one is pruned; return that one, too."""
    for seed in range(most):
        asked = replace(request(10_000, seed=1000 + seed), request_id=f"dense {seed}")
        if planner(known).plan(asked).kind is PlanKind.PRUNE:
            return seed, asked
        known.learn(asked, report(reason=Reason.NO_GAIN, prefill_s=1.0, ttft_s=1.01))
    raise AssertionError("never tried again")


def scored_in(seconds: float) -> Report:
    return report(
        PlanKind.PRUNE, kept_tokens=2000, speculate_s=seconds, prefill_s=0.21,
        ttft_s=seconds + 0.22,
    )  # fmt: skip


def slowed_down() -> NetGain:
    """Five scorings of twenty took five seconds, none of them too long."""
    known = gain()
    for number in range(20):
        known.learn(request(10_000, number), scored_in(0.15 if number < 15 else 5.0))
    assert planner(known).plan(request(10_000, seed=30)).reason is Reason.NO_GAIN
    return known


def test_a_speculator_that_was_slow_for_a_while_is_tried_by_one_prompt():
    known = slowed_down()
    _, tried = until_tried(known)
    assert planner(known).plan(request(10_000, seed=31)).reason is Reason.NO_GAIN  # only that one
    known.learn(tried, scored_in(0.15))
    assert planner(known).plan(request(10_000, seed=32)).kind is PlanKind.PRUNE


def test_one_that_stays_slow_is_tried_ever_more_seldom():
    known, pauses = slowed_down(), []
    for _ in range(3):
        pause, tried = until_tried(known)
        pauses.append(pause)
        known.learn(tried, scored_in(5.0))
    assert pauses[1:] == [2 * pauses[0], 4 * pauses[0]]


def test_a_speculator_that_was_slow_is_tried_again_ever_more_seldom_and_recovers():
    known = gain()
    pauses = []
    for _ in range(3):
        while planner(known).plan(request(10_000, seed=7)).kind is PlanKind.PRUNE:
            known.learn_unscored(request(10_000, seed=7), 10.0)
        pauses.append(dense_until_pruned(known))
    assert pauses[1:] == [2 * pauses[0], 4 * pauses[0]]
    scored = report(PlanKind.PRUNE, kept_tokens=2000, speculate_s=0.15, prefill_s=0.21, ttft_s=0.37)
    known.learn(request(10_000), scored)
    assert planner(known).plan(request(10_000, seed=8)).kind is PlanKind.PRUNE
