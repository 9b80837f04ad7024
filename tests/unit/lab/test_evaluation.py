"""The quality suite over a backend with scripted answers: arms, pairing, gates, tables."""

from __future__ import annotations

import json
import random
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest

from specprefill.cli import evaluate
from specprefill.cli.exit_codes import Misused
from specprefill.config import AppConfig
from specprefill.core.chunks import Chunks
from specprefill.core.selection import select
from specprefill.core.types import Plan, PlanKind, Reason, Span
from specprefill.lab.evaluation import report
from specprefill.lab.evaluation.arms import CONTROLS, DENSE, Arm, Chooser, arms_of, control_scores
from specprefill.lab.evaluation.journal import Journal, OtherSettings
from specprefill.lab.evaluation.outcomes import ArmAnswer
from specprefill.lab.evaluation.prunable import prunable
from specprefill.lab.evaluation.suite import PROBED_ITEMS, Suite, measure
from specprefill.lab.evaluation.summary import choices, choices_of_all, rows_of, smallest_enough
from specprefill.lab.families.catalog import generate
from specprefill.lab.reporting.tables import provenance
from tests.policies import PAPER

HALF = Arm(Chooser.SPECULATOR, 0.5)
ARMS = arms_of((1.0, 0.5, 0.1), 0.1, automatic=True, ceiling=True)


class Scripted:
    """Answers rightly where `knows` is true; counts the questions."""

    def __init__(self, knows):
        self.knows = knows
        self.texts_asked = 0

    def answers(self, task, arms, rng, *, with_text):
        self.texts_asked += with_text * len(arms)
        return [self._answer(task, arm, with_text) for arm in arms]

    def _answer(self, task, arm, with_text):
        text = " ".join(task.references) if self.knows(task, arm) else "nothing"
        keep = 0.3 if arm.chooser is Chooser.AUTOMATIC else arm.keep
        kept = round(task.prompt_tokens * keep)
        text = text if with_text else None
        return ArmAnswer(text, task.prompt_tokens, kept, reason="asked", gold_kept=keep)


def suite(families=("niah_single_1",), items=8, lengths=(400,)):
    return Suite(families, lengths, items, ARMS, seed=1, least_dense=0.2)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.jsonl"


@pytest.fixture
def run(demo_tokenizer, path):
    """A suite through a backend, with an empty journal unless another is given."""

    def measured(asked, backend, journal=None):
        reported = []

        def on_progress(done, what):
            reported.append((done, what))

        journal = Journal.create(path, {}) if journal is None else journal
        return measure(asked, backend, demo_tokenizer, 1, on_progress, journal), reported

    return measured


def test_the_arms_begin_with_dense_and_end_with_the_ceiling():
    assert [arm.name for arm in ARMS] == [
        "dense", "keep 0.5", "keep 0.1", "automatic",
        "random 0.1", "ends 0.1", "even 0.1", "main_model 0.1", "oracle 0.1",
    ]  # fmt: skip


@pytest.mark.parametrize("chooser", CONTROLS)
@pytest.mark.parametrize("tokens", [1000, 4096])
def test_a_control_keeps_what_is_protected_and_the_speculators_budget(chooser, tokens):
    policy = replace(PAPER, min_kept_tokens=64)
    protected = (Span(100, 140),)
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.2)
    noise = np.random.default_rng(0).random(tokens, dtype=np.float32)
    ours = select(noise, plan, protected, policy)
    chunks = Chunks.of_equal_length(tokens, policy.chunk_tokens)
    scores = control_scores(chooser, chunks, random.Random(0))
    theirs = select(scores, plan, protected, policy)
    assert abs(theirs.kept_tokens - ours.kept_tokens) < policy.chunk_tokens
    assert any(run.start <= 100 and run.stop >= 140 for run in theirs.runs)


def test_ends_keep_both_ends_and_even_leaves_no_wide_gap():
    policy = replace(PAPER, min_kept_tokens=0, sink_tokens=0, tail_tokens=0)
    plan = Plan(PlanKind.PRUNE, Reason.ASKED, 0.25)
    chunks = Chunks.of_equal_length(2048, 32)
    runs = {
        chooser: select(control_scores(chooser, chunks, random.Random(0)), plan, (), policy).runs
        for chooser in (Chooser.ENDS, Chooser.EVEN)
    }
    assert runs[Chooser.ENDS] == (Span(0, 256), Span(1792, 2048))
    starts = [run.start for run in runs[Chooser.EVEN]]
    assert max(np.diff(starts)) <= 256


def test_a_speculator_is_no_control():
    with pytest.raises(ValueError, match="speculator is no control"):
        control_scores(Chooser.SPECULATOR, Chunks.of_equal_length(100, 32), random.Random(0))


def test_what_is_retained_is_measured_on_the_same_prompts(run):
    def knows(task, arm):
        return arm.keep > 0.3 or int(task.references[0]) % 2 == 0

    measured, reported = run(suite(items=40), Scripted(knows))
    (row,) = rows_of(measured, suite(items=40))
    by_arm = {cell.arm.name: cell for cell in row.cells}
    even = [int(one.score) for one in measured.outcomes if one.arm.name == "keep 0.1"]
    assert by_arm["keep 0.5"].retained.value == 1.0
    assert by_arm["keep 0.1"].retained.value == pytest.approx(sum(even) / 40)
    assert by_arm["keep 0.1"].retained.low < sum(even) / 40 < by_arm["keep 0.1"].retained.high
    assert by_arm["keep 0.1"].kept == pytest.approx(0.1, abs=0.01)
    assert reported[-1] == (40, "niah_single_1 400")


def test_a_family_beyond_the_model_is_only_probed(run):
    backend = Scripted(lambda _task, _arm: False)
    measured, _ = run(suite(items=9), backend)
    assert backend.texts_asked == PROBED_ITEMS
    assert measured.beyond_model == (("niah_single_1", 400),)
    gold = [one for one in measured.outcomes if one.answer.gold_kept is not None]
    assert len(gold) == 9 * len(ARMS)
    scored = [one for one in measured.outcomes if one.score is not None]
    assert [(one.arm, one.score) for one in scored] == [(DENSE, 0.0)] * PROBED_ITEMS


def test_what_the_probe_answered_is_not_asked_again(run):
    backend = Scripted(lambda _task, _arm: True)
    measured, _ = run(suite(items=8), backend)
    assert backend.texts_asked == 8 * len(ARMS) == len(measured.outcomes)
    assert [one.arm for one in measured.outcomes] == [*ARMS] * 8


def test_where_nothing_is_right_nothing_is_retained(run):
    asked = replace(suite(), least_dense=0.0)
    measured, _ = run(asked, Scripted(lambda *_: False))
    assert measured.beyond_model == ()
    assert choices(rows_of(measured, asked), asked, 400) == []
    text = report.text(report.report_of(measured, asked, {}))
    assert "| niah_single_1 | 8       | 0% [0%, 0%] | -        | -" in text


def test_a_length_that_cannot_hold_a_family_is_named(run):
    asked = suite(("tool_call", "niah_single_1"), lengths=(400, 2048), items=2)
    measured, reported = run(asked, Scripted(lambda *_: True))
    assert measured.too_short == (("tool_call", 400),)
    assert {(one.family, one.length) for one in measured.outcomes} == {
        ("tool_call", 2048), ("niah_single_1", 400), ("niah_single_1", 2048),
    }  # fmt: skip
    assert reported[-1][0] == asked.prompts


def test_the_smallest_rate_that_is_enough_holds_in_every_family(run):
    asked = suite(("niah_single_1", "niah_single_2"))

    def knows(task, arm):
        return arm.keep >= 0.5 or task.family == "niah_single_1"

    measured, _ = run(asked, Scripted(knows))
    found = choices(rows_of(measured, asked), asked, 400)
    assert [each.arm.name for each in found] == ["dense", "keep 0.5", "keep 0.1", "automatic"]
    assert smallest_enough(found).arm == Arm(Chooser.SPECULATOR, 0.5)
    worst = {each.arm.name: each.worst_family for each in found if not each.is_enough}
    assert worst == {"keep 0.1": "niah_single_2"}


def test_families_beyond_the_model_are_compared_by_their_gold(run):
    asked = suite(("niah_single_1", "niah_single_2"))
    measured, _ = run(asked, Scripted(lambda task, _arm: task.family == "niah_single_1"))
    rows = rows_of(measured, asked)
    assert smallest_enough(choices(rows, asked, 400)).arm == Arm(Chooser.SPECULATOR, 0.1)
    of_all = choices_of_all(rows, asked, 400)
    worst = {each.arm.name: (each.worst_family, each.worst_retained) for each in of_all}
    assert worst["keep 0.5"] == ("niah_single_2", 0.5)
    assert worst["automatic"] == ("niah_single_2", 0.3)
    assert smallest_enough(of_all).arm == DENSE
    text = report.text(report.report_of(measured, asked, {}))
    assert "## Smallest rate that is enough for all families at 400 tokens" in text


def test_kinds_of_answers_leave_out_families_beyond_the_model(run):
    asked = suite(("niah_single_1", "niah_single_2"))
    measured, _ = run(asked, Scripted(lambda task, _arm: task.family == "niah_single_1"))
    assert measured.beyond_model == (("niah_single_2", 400),)
    text = report.text(report.report_of(measured, asked, {}))
    (table,) = [part for part in text.split("## ") if part.startswith("Kinds of answers")]
    dense = next(line for line in table.splitlines() if line.startswith("| dense"))
    assert sum(int(cell) for cell in dense.strip("|").split("|")[1:]) == asked.items


def test_without_any_answered_family_there_are_no_kinds_of_answers(run):
    measured, _ = run(suite(), Scripted(lambda *_: False))
    assert "Kinds of answers" not in report.text(report.report_of(measured, suite(), {}))


def test_where_gold_is_unknown_only_answers_are_compared(run):
    class Remote(Scripted):
        def _answer(self, task, arm, with_text):
            return replace(super()._answer(task, arm, with_text), gold_kept=None)

    asked = replace(suite(("niah_single_1", "niah_single_2")), gold_known=False)
    measured, _ = run(asked, Remote(lambda task, _arm: task.family == "niah_single_1"))
    rows = rows_of(measured, asked)
    assert smallest_enough(choices(rows, asked, 400)).arm == Arm(Chooser.SPECULATOR, 0.1)
    assert choices_of_all(rows, asked, 400) == []
    assert [each.family for each in prunable(measured, asked, 400)] == ["niah_single_1", "all"]
    text = report.text(report.report_of(measured, asked, {}))
    assert "for all families" not in text
    assert "Gold survival" not in text
    assert "niah_single_2 at 400 tokens is beyond the model (dense score below 0.2): kept" in text


def test_a_report_is_written_as_tables_json_and_a_page(run, tmp_path):
    asked = suite()
    measured, _ = run(asked, Scripted(lambda _task, arm: arm in (DENSE, HALF)))
    found = report.report_of(measured, asked, {"main model": "scripted"})
    text = report.text(found)
    assert "## Answers retained at 400 tokens" in text
    assert "| niah_single_1 | 8       | 100% [100%, 100%] | 100% [100%, 100%] | 0% [0%, 0%]" in text
    assert "The automatic rate keeps 0.60 of the tokens of keep 0.5." in text
    assert (
        "| niah_single_1 | automatic | 30%       | 30%           | 0% [0%, 0%] | asked 8 |" in text
    )
    data, page = report.write(found, provenance(1), tmp_path)
    saved = json.loads(data.read_text())
    assert saved["measured"]["seed"] == 1
    assert len(saved["outcomes"]) == 8 * len(ARMS)
    assert saved["rows"][0]["cells"][0]["score"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    html = page.read_text()
    assert "<svg" in html
    assert "http-equiv" not in html
    assert "src=" not in html
    report.write_document(found, provenance(1), tmp_path / "quality.md")
    assert "## What was kept" in (tmp_path / "quality.md").read_text()


def test_the_papers_scorer_stands_beside_a_calibrated_one(run):
    arms = arms_of((1.0, 0.5, 0.1), None, automatic=True, ceiling=False, paper=True)
    asked = replace(suite(), arms=arms)
    measured, _ = run(asked, Scripted(lambda _task, arm: arm.chooser is not Chooser.PAPER))
    text = report.text(report.report_of(measured, asked, {}))
    (table,) = [part for part in text.split("## ") if part.startswith("Beside the paper's scorer")]
    header, _, row = table.strip().splitlines()[-3:]
    assert [cell.strip() for cell in header.strip("|").split("|")] == [
        "family", "keep 0.5", "paper 0.5", "keep 0.1", "paper 0.1", "automatic", "paper automatic",
    ]  # fmt: skip
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        "niah_single_1", "50% (100%)", "50% (0%)", "10% (100%)", "10% (0%)", "30% (100%)",
        "100% (100%)",
    ]  # fmt: skip


def test_the_automatic_rate_is_judged_on_the_prompts_that_can_be_pruned(run, demo_tokenizer):
    def knows(task, arm):  # of four prompts: two can be pruned, of which automatic loses one
        if arm == DENSE:
            return True
        kept_by = {0: (HALF, Arm(Chooser.AUTOMATIC, 1.0)), 1: (HALF,)}
        return arm in kept_by.get(int(task.references[0]) % 4, ())

    asked = suite(items=40)
    measured, _ = run(asked, Scripted(knows))
    tasks = [
        generate("niah_single_1", asked.seed * 1_000_000 + item, 400, demo_tokenizer)
        for item in range(40)
    ]
    kinds = [int(task.references[0]) % 4 for task in tasks]
    family, total = prunable(measured, asked, 400)
    assert (family.family, total.family) == ("niah_single_1", "all")
    assert family.prompts == 40
    assert family.can_be_pruned == kinds.count(0) + kinds.count(1) == family.pruned
    assert family.lost == kinds.count(1)
    assert family.kept == pytest.approx(0.3, abs=0.01)
    assert family.retained.value == pytest.approx(kinds.count(0) / 40)
    assert "## Prompts that can be pruned at 400 tokens" in report.text(
        report.report_of(measured, asked, {})
    )


def test_what_is_not_answered_can_be_pruned_where_all_gold_is_kept(run):
    backend = Scripted(lambda *_: False)
    asked = suite(items=9)
    measured, _ = run(asked, backend)
    assert prunable(measured, asked, 400)[0].can_be_pruned == 0  # half of the gold is kept
    whole = [
        replace(one, answer=replace(one.answer, gold_kept=1.0)) if one.arm == HALF else one
        for one in measured.outcomes
    ]
    (family, _) = prunable(replace(measured, outcomes=tuple(whole)), asked, 400)
    assert (family.can_be_pruned, family.lost) == (9, 9)
    assert family.retained is None


def test_without_an_automatic_rate_nothing_is_said_of_it(run):
    asked = replace(suite(), arms=arms_of((1.0, 0.5), None, automatic=False, ceiling=False))
    measured, _ = run(asked, Scripted(lambda *_: True))
    assert prunable(measured, asked, 400) == []
    assert "can be pruned" not in report.text(report.report_of(measured, asked, {}))


def test_dense_is_the_first_arm():
    assert ARMS[0] == DENSE
    assert DENSE.is_dense
    assert not Arm(Chooser.MAIN_MODEL, 1.0).is_dense


class Interrupted(Scripted):
    """The user presses Ctrl-C once some prompts have all their answers."""

    def __init__(self, prompts):
        super().__init__(lambda *_: True)
        self.prompts = prompts

    def answers(self, task, arms, rng, *, with_text):
        if len(arms) > 1:
            self.prompts -= 1
        if self.prompts < 0:
            raise KeyboardInterrupt
        return super().answers(task, arms, rng, with_text=with_text)


def test_an_interrupted_run_goes_on_where_it_stopped(run, path):
    whole, _ = run(suite(), Scripted(lambda *_: True))
    with pytest.raises(KeyboardInterrupt):
        run(suite(), Interrupted(3), Journal.create(path, {"seed": "1"}))
    journal = Journal.resume(path, {"seed": "1"})
    assert len(journal) == 3
    backend = Scripted(lambda *_: True)
    resumed, _ = run(suite(), backend, journal)
    assert backend.texts_asked == 5 * len(ARMS)
    assert resumed == whole


def test_more_prompts_and_families_are_added_to_what_is_there(run, path):
    run(suite(items=2), Scripted(lambda *_: True))
    backend = Scripted(lambda *_: True)
    asked = suite(("niah_single_1", "niah_single_2"), items=3)
    run(asked, backend, Journal.resume(path, {}))
    assert backend.texts_asked == (1 + 3) * len(ARMS)


def test_a_line_that_was_cut_off_is_asked_again(run, path):
    run(suite(items=2), Scripted(lambda *_: True))
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    journal = Journal.resume(path, {})
    assert len(journal) == 1
    run(suite(items=2), Scripted(lambda *_: True), journal)
    assert path.read_bytes() == whole


def test_prompts_that_were_only_probed_are_answered_when_the_family_is_not_beyond(run, path):
    asked = suite(items=2)
    run(asked, Scripted(lambda *_: False))
    assert len(Journal.resume(path, {})) == 2
    backend = Scripted(lambda *_: True)
    run(replace(asked, least_dense=0.0), backend, Journal.resume(path, {}))
    assert backend.texts_asked == 2 * (len(ARMS) - 1)


def test_a_journal_of_other_settings_is_refused(path):
    Journal.create(path, {"seed": "1"})
    with pytest.raises(OtherSettings, match='"seed":"1"'):
        Journal.resume(path, {"seed": "2"})


def configured(speculator=(), **selection) -> AppConfig:
    return AppConfig.model_validate({
        "model": {"path": "main"},
        "speculator": {"path": "draft", "score_heads": {0: [1]}, **dict(speculator)},
        "selection": selection,
    })  # fmt: skip


def open_journal(config, folder, *, resume, tokenizer=None) -> Journal:
    args = Namespace(endpoint=None, out=folder, resume=resume, tokenizer=tokenizer)
    return evaluate._journal(args, suite(), evaluate._subject(args, config))


@pytest.mark.parametrize(
    "changed",
    [
        configured(peak_share=0.2),
        configured(least_certainty=0.5),
        configured(floor=0.1),
        configured(ceiling=0.5),
        configured(pool_tokens=7),
        configured(protect_fences=True),
        configured({"look_ahead": 4}),
        configured({"score_heads": {0: [2]}}),
        configured({"revision": "other"}),
    ],
)
def test_other_settings_of_what_is_kept_begin_another_evaluation(changed, tmp_path):
    open_journal(configured(), tmp_path, resume=False)
    with pytest.raises(Misused, match="was written with other settings"):
        open_journal(changed, tmp_path, resume=True)


def test_another_tokenizer_begins_another_evaluation(tmp_path):
    open_journal(configured(), tmp_path, resume=False)
    with pytest.raises(Misused, match="was written with other settings"):
        open_journal(configured(), tmp_path, resume=True, tokenizer="another")


def test_an_evaluation_goes_on_with_other_threads_and_memory(tmp_path):
    open_journal(configured(), tmp_path, resume=False)
    sizes = {"threads": 3, "kv_memory_bytes": 1 << 20, "prefill_chunk_tokens": 64, "max_batch": 1}
    open_journal(configured(sizes), tmp_path, resume=True)


def test_the_digest_of_the_settings_is_the_same_everywhere():
    here, there = (configured({"path": path}) for path in ("/home/a/draft", "/mnt/draft"))
    assert evaluate._settings_digest(here) == evaluate._settings_digest(there)
    assert len(evaluate._settings_digest(here)) == 12
