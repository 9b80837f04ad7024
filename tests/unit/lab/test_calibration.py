"""The choice between ways to score, and the settings of the automatic rate, from known scores."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from specprefill.config import SelectionConfig
from specprefill.control.from_config import selection_policy
from specprefill.core.types import KeepRange, Span
from specprefill.lab.calibration.candidates import (
    Candidate,
    ScoredTask,
    automatic_rate,
    choose,
    survivals,
)
from specprefill.lab.calibration.masses import best_heads
from specprefill.speculator.method import PAPER, Queries, Reduction, ScoringMethod

TOKENS, CHUNK = 1024, 32
POLICY = selection_policy(SelectionConfig(min_kept_tokens=32, tail_tokens=1, sink_tokens=1))
WITHIN = KeepRange(0.05, 1.0)
BY_PAPER = Candidate("paper", PAPER, 1.0)
CALIBRATED = Candidate("8 heads", ScoringMethod({1: (0,)}, Reduction.MEAN), 1.0)
EARLY = Candidate("early", ScoringMethod({0: (0,)}, Reduction.MEAN, Queries.QUESTION), 0.5)


def scores(*chunks: int, background: float = 0.01) -> np.ndarray:
    """Scores that stand out in some chunks."""
    made = np.full(TOKENS, background, dtype=np.float32)
    made += np.linspace(0, background / 10, TOKENS, dtype=np.float32)
    for chunk in chunks:
        made[chunk * CHUNK : (chunk + 1) * CHUNK] = 1.0
    return made


def task(family: str, gold: int, certainty: float = 1.0, **by: np.ndarray) -> ScoredTask:
    names = {"paper": "paper", "ours": "8 heads", "early": "early"}
    spans = () if gold < 0 else (Span(gold * CHUNK + 2, gold * CHUNK + 20),)
    return ScoredTask(family, (), spans, {names[key]: by[key] for key in by}, certainty)


def test_the_way_that_keeps_more_gold_is_chosen() -> None:
    tasks = [task("a", 7, paper=scores(20, background=0.5), ours=scores(7))] * 2
    found = survivals([BY_PAPER, CALIBRATED], tasks, POLICY)
    assert found[0].mean < found[1].mean == 1.0
    assert choose(found).candidate is CALIBRATED


def test_the_papers_way_stays_unless_another_is_better() -> None:
    tasks = [task("a", 7, paper=scores(7), ours=scores(7))]
    found = survivals([BY_PAPER, CALIBRATED], tasks, POLICY)
    assert choose(found).candidate is BY_PAPER


def test_a_way_that_loses_a_family_is_not_chosen() -> None:
    lost, won = scores(20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), scores(7)
    tasks = [
        *(task(name, 7, paper=lost, ours=won) for name in "aabbcc"),
        *[task("d", 7, paper=won, ours=lost)] * 2,
    ]
    found = survivals([BY_PAPER, CALIBRATED], tasks, POLICY)
    assert found[1].mean > found[0].mean
    assert choose(found).candidate is BY_PAPER


def test_one_prompt_of_a_family_may_be_chance() -> None:
    lost, won = scores(20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), scores(7)
    tasks = [
        *(task(name, 7, paper=lost, ours=won) for name in "aabbcc"),
        task("d", 7, paper=won, ours=lost),
        task("d", 7, paper=won, ours=won),
    ]
    found = survivals([BY_PAPER, CALIBRATED], tasks, POLICY)
    assert found[1].worst_loss(found[0]) == 0.5
    assert choose(found).candidate is CALIBRATED


def test_the_cheaper_of_two_good_ways_is_chosen() -> None:
    lost, won = scores(20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30), scores(7)
    tasks = [task("a", 7, paper=lost, ours=won, early=won)]
    found = survivals([BY_PAPER, CALIBRATED, EARLY], tasks, POLICY)
    assert choose(found).candidate is EARLY


def test_the_automatic_rate_prunes_facts_and_leaves_what_needs_all() -> None:
    facts = [task("fact", 7, certainty=0.6, ours=scores(7, background=0.04))] * 3
    spread = [task("all", -1, certainty=0.6, ours=scores(7, background=0.2))] * 3
    rate = automatic_rate(CALIBRATED, [*facts, *spread], POLICY, WITHIN)
    assert (rate.pruned, rate.can_be_pruned, rate.sent_dense, rate.others) == (3, 3, 3, 3)
    assert (rate.survival, rate.merit) == (1.0, 1.0)
    assert 0.5 < rate.kept < 0.6
    assert 0.04 < rate.peak_share <= 0.2
    assert rate.least_certainty <= 0.6


def test_certainty_separates_them_where_scores_do_not() -> None:
    facts = [task("fact", 7, certainty=0.9, ours=scores(7, background=0.03))] * 3
    others = range(10, 26)  # half of the prompt, and not the gold
    guessed = [task("guess", 9, certainty=0.2, ours=scores(*others, background=0.03))] * 3
    rate = automatic_rate(CALIBRATED, [*facts, *guessed], POLICY, WITHIN)
    assert rate.can_be_pruned == rate.others == 3
    assert 0.2 < rate.least_certainty <= 0.9
    assert rate.merit == 1.0


def test_prompts_that_the_draft_gets_wrong_in_all_ways_do_not_stop_the_others() -> None:
    facts = [task("fact", 7, certainty=0.9, ours=scores(7, background=0.03))] * 3
    wrong = [task("wrong", 9, certainty=0.9, ours=scores(*range(10, 12), background=0.03))] * 3
    wrong = [replace(one, scores={"8 heads": _without(one, 9)}) for one in wrong]
    rate = automatic_rate(CALIBRATED, [*facts, *wrong], POLICY, WITHIN)
    assert (rate.pruned, rate.can_be_pruned, rate.sent_dense) == (3, 3, 0)


def _without(one: ScoredTask, chunk: int) -> np.ndarray:
    """The task's scores with a chunk that is last in every order."""
    made = one.scores["8 heads"].copy()
    made[chunk * CHUNK : (chunk + 1) * CHUNK] = 0.0
    made[(chunk - 1) * CHUNK : chunk * CHUNK] = 0.0
    return made


def test_without_a_look_ahead_there_is_no_certainty_to_ask_for() -> None:
    facts = [task("fact", 7, certainty=0.0, early=scores(7))] * 3
    rate = automatic_rate(EARLY, facts, POLICY, WITHIN)
    assert rate.least_certainty == 0.0
    assert rate.pruned == 3


@pytest.mark.parametrize(
    ("count", "last", "heads"),
    [
        (1, 5, {5: (1,)}),
        (3, 5, {2: (0, 1), 5: (1,)}),
        (3, 2, {2: (0, 1)}),  # the third one looks away from the gold
        (2, 0, None),
    ],
)
def test_the_heads_with_the_highest_masses_count(count, last, heads) -> None:
    masses = np.array([[-0.1, 0.0], [0.2, 0.3], [-0.2, 0.9]])
    method = best_heads(masses, (0, 2, 5), count, last)
    assert method == ScoringMethod(heads)
