"""The arithmetic of the comparison of keep-rate rules."""

from dataclasses import replace

import numpy as np
import pytest

from loadtest.bench import keep_rates
from loadtest.bench.keep_rates import FamilyResult, Result, ScoredPrompt
from specprefill.core.chunks import Chunks
from specprefill.core.types import Plan, PlanKind, Reason, Selection, Span
from tests.policies import PAPER

POLICY = replace(PAPER, min_kept_tokens=32, sink_tokens=0, tail_tokens=0)


def kept_selection(*runs: Span) -> Selection:
    return Selection(1000, runs, Plan(PlanKind.PRUNE, Reason.ASKED, 0.3))


def result(variant: str, kept_share: float, **families: float) -> Result:
    found = {name: FamilyResult(share, kept_share, 0.0) for name, share in families.items()}
    return Result(variant, found)


def prompt(certainty: float = 1.0) -> ScoredPrompt:
    scores = np.full(3200, 0.001, dtype=np.float32)
    scores[320:352] = 1.0
    scores[0] = 0.002
    return ScoredPrompt("needles", scores, certainty, (), (Span(330, 340),))


def test_gold_survives_only_whole():
    gold = (Span(10, 20), Span(90, 110))
    assert keep_rates.survival(gold, kept_selection(Span(0, 100))) == 0.5
    assert keep_rates.survival(gold, kept_selection(Span(0, 15), Span(16, 200))) == 0.5
    assert keep_rates.survival(gold, kept_selection(Span(0, 200))) == 1.0


def test_where_all_of_the_prompt_is_gold_the_kept_share_counts():
    assert keep_rates.survival((), kept_selection(Span(0, 300))) == 0.3


def test_every_variant_selects_as_the_service_does():
    results = {
        variant.name: keep_rates.measure_variant(variant, [prompt()])
        for variant in keep_rates.variants(POLICY)
    }
    peaks = results["peaks 0.1, unsure: dense"].families["needles"]
    assert (peaks.survival, peaks.dense) == (1.0, 0.0)
    assert peaks.kept == pytest.approx(0.05)
    assert results["keep 0.3"].kept == pytest.approx(0.3)
    assert results["keep 1"].families["needles"].dense == 1.0


def test_the_guard_sends_the_uncertain_dense():
    variants = {variant.name: variant for variant in keep_rates.variants(POLICY)}
    guarded = keep_rates.measure_variant(variants["peaks 0.1, unsure: dense"], [prompt(0.2)])
    free = keep_rates.measure_variant(variants["peaks 0.1"], [prompt(0.2)])
    assert (guarded.kept, free.families["needles"].dense) == (1.0, 0.0)


def test_the_best_of_a_rule_is_enough_with_the_fewest_tokens():
    results = [
        result("mass 0.5", 0.2, a=1.0, b=0.9),
        result("mass 0.7", 0.4, a=1.0, b=0.96),
        result("mass 0.9", 0.8, a=1.0, b=1.0),
        result("knee 1", 0.1, a=0.3, b=0.9),
        result("knee 2", 0.2, a=0.5, b=1.0),
        result("knee 3", 0.3, a=0.9, b=1.0),
        result("mass 0.5, unsure: dense", 0.5, a=1.0, b=1.0),
    ]
    best = [each.variant for each in keep_rates.best_of_each_rule(results)]
    assert best == ["mass 0.7", "knee 2", "mass 0.5, unsure: dense"]


def test_the_overview_compares_with_the_smallest_fixed_rate_that_is_enough():
    text = keep_rates.overview(
        [
            result("keep 0.3", 0.3, a=0.5),
            result("keep 0.5", 0.5, a=0.97),
            result("keep 0.9", 0.9, a=1.0),
            result("peaks 0.1", 0.25, a=0.96),
        ]
    )
    lines = text.splitlines()
    assert "of keep 0.5" in lines[0]
    assert lines[2].startswith("| peaks 0.1 | 0 ")
    assert "0.50" in lines[2]
    assert lines[-1].startswith("| keep 0.3  | 1 ")


def test_families_side_by_side():
    text = keep_rates.by_family([result("keep 0.3", 0.3, a=0.5, b=1.0)])
    assert "50% of gold at 30%" in text


def test_a_fact_across_a_border_survives_by_the_share_of_the_next_chunk():
    scores = np.full(3200, 0.001, dtype=np.float32)
    scores[320:352] = 1.0
    scores[1600:2600] = 0.25  # more chunks than the budget has
    asked = ScoredPrompt("needles", scores, 1.0, (), (Span(340, 370),))
    survived = {
        variant.name: keep_rates.measure_variant(variant, [asked]).families["needles"].survival
        for variant in keep_rates.next_shares(POLICY)
    }
    assert survived["keep 0.1, next 0"] == 0.0
    assert survived["keep 0.1, next 0.2"] == 0.0
    assert survived["keep 0.1, next 0.3"] == 1.0


def test_chunks_that_follow_the_text_keep_a_fact_that_equal_ones_cut():
    scores = np.full(3200, 0.001, dtype=np.float32)
    scores[340:350] = 1.0  # of a sentence that ends behind the border at 352
    scores[1600:2600] = 0.2
    asked = ScoredPrompt("needles", scores, 1.0, (), (Span(340, 362),))
    at_its_ends = Chunks(np.array([*range(0, 340, 16), 340, 362, *range(378, 3200, 16)]), 3200)
    asked = replace(asked, chunks=at_its_ends)
    policy = replace(POLICY, chunk_tokens=16)
    found = {
        variant.name: keep_rates.measure_variant(variant, [asked]).families["needles"].survival
        for variant in keep_rates.chunkings(policy)
    }
    assert found["text, keep 0.05"] == found["text, automatic"] == 1.0
    assert found["equal, keep 0.05"] == 0.0
