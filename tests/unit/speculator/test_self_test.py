"""A draft that cannot choose is found out, and not used where nobody asked for it."""

from __future__ import annotations

import asyncio
import json
import shutil

import pytest

from specprefill.config import SelectionConfig, SpeculatorConfig
from specprefill.core.errors import ScoringTimeout, SpeculatorUnavailable
from specprefill.core.plan import LEAST_FACTS_KEPT, Planner, can_choose
from specprefill.core.types import (
    Controls,
    Plan,
    PlanKind,
    Reason,
    Request,
    Selection,
    Span,
    dense_selection,
)
from specprefill.gateway.pools.draft_state import SelfTestWatch
from specprefill.gateway.pools.health import judge
from specprefill.speculator.self_test import KEEP, POLICY, PROMPTS, questions, self_test
from specprefill.speculator.service import SpeculatorService


@pytest.fixture(scope="module")
def asked(root):
    return questions(str(root / "models" / "demo-main"))


class Chooses:
    """A service that keeps what the test asks for."""

    def __init__(self, root, runs_of, fails_from=PROMPTS):
        self.main = str(root / "models" / "demo-main")
        self._runs_of, self._fails_from = runs_of, fails_from
        self.calls = 0

    async def select(self, request, plan, timeout_s, policy=None):
        assert policy is POLICY
        self.calls += 1
        if self.calls > self._fails_from:
            raise ScoringTimeout("slow")
        runs = self._runs_of(request)
        if runs is None:
            return dense_selection(len(request.prompt), Reason.FLAT_SCORES)
        return Selection(len(request.prompt), runs, plan)

    async def test(self):
        return await self_test(self, self.main)


def gold_of(asked):
    return {question.prompt: question.gold for question in asked}


def test_the_prompts_are_the_same_every_time_and_hold_their_facts(root, asked, demo_tokenizer):
    assert asked == questions(str(root / "models" / "demo-main"))
    assert len(asked) == PROMPTS
    for question in asked:
        assert any(char.isdigit() for char in demo_tokenizer.decode(
            question.prompt[question.gold.start : question.gold.stop]
        ))  # fmt: skip


async def test_the_share_is_of_facts_that_are_kept_whole(root, asked):
    gold = gold_of(asked)

    def half(request):
        span = gold[request.prompt]
        whole = int(request.request_id[-1]) % 2
        return (Span(span.start, span.stop if whole else span.stop - 1),)

    assert await Chooses(root, half).test() == 0.5


async def test_scores_without_a_difference_keep_no_fact(root):
    assert await Chooses(root, lambda _request: None).test() == 0.0


@pytest.mark.parametrize(("answered", "known"), [(3, False), (5, True)])
async def test_too_few_answers_give_no_result(root, asked, answered, known):
    gold = gold_of(asked)
    service = Chooses(root, lambda request: (gold[request.prompt],), answered)
    assert (await service.test() is not None) is known


async def test_a_missing_tokenizer_gives_no_result(tmp_path):
    assert await self_test(Chooses(tmp_path, lambda _request: None), str(tmp_path)) is None


@pytest.fixture(scope="module")
def truncated(root, tmp_path_factory):
    """The shipped draft without its upper layers: it loads, and scores like any other."""
    folder = tmp_path_factory.mktemp("drafts") / "truncated"
    shutil.copytree(root / "models" / "demo-speculator", folder)
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["num_hidden_layers"] = 1
    file.write_text(json.dumps(config))
    return folder


async def kept_by(root, path, **options):
    config = SpeculatorConfig(path=str(path), dtype="float32", device="cpu", **options)
    main = str(root / "models" / "demo-main")
    service = SpeculatorService.from_config(config, SelectionConfig(), main, 32)
    async with service:
        return await self_test(service, main)


async def test_the_shipped_draft_passes(root, one_thread):
    assert await kept_by(root, root / "models" / "demo-speculator") >= 0.9


async def test_a_truncated_draft_and_a_random_one_fail(root, truncated, one_thread):
    for share in (
        await kept_by(root, truncated),
        await kept_by(root, root / "models" / "demo-speculator", random_weights=True),
    ):
        assert share < LEAST_FACTS_KEPT
        assert not can_choose(share)


@pytest.mark.parametrize(
    ("controls", "plan"),
    [
        (Controls(), (PlanKind.DENSE, Reason.SPECULATOR_UNFIT)),
        (Controls(auto=True), (PlanKind.DENSE, Reason.SPECULATOR_UNFIT)),
        (Controls(keep=0.3), (PlanKind.PRUNE, Reason.ASKED)),
        (Controls(prune=True), (PlanKind.PRUNE, Reason.ASKED)),
        (Controls(prune=False), (PlanKind.DENSE, Reason.ASKED_OFF)),
    ],
)
def test_an_unfit_draft_prunes_only_where_asked(controls, plan):
    planner = Planner(enabled=True, keep=KEEP, min_prompt_tokens=10, unfit=lambda: True)
    made = planner.plan(Request("r", tuple(range(100)), b"", controls=controls))
    assert (made.kind, made.reason) == plan


def test_a_fit_or_untested_draft_prunes():
    assert can_choose(None)
    planner = Planner(enabled=True, keep=KEEP, min_prompt_tokens=10, unfit=lambda: False)
    plan = planner.plan(Request("r", tuple(range(100)), b""))
    assert plan == Plan(PlanKind.PRUNE, Reason.DEFAULT, KEEP)


async def test_a_gateway_asks_until_it_knows(monkeypatch):
    monkeypatch.setattr("specprefill.gateway.pools.draft_state._PERIOD_S", 0.0)
    answers = iter([SpeculatorUnavailable("starting"), None, 0.25])
    known = asyncio.Event()

    async def ask():
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        if answer is not None:
            known.set()
        return answer

    watch = SelfTestWatch(ask)
    assert not watch.is_unfit()
    watch.start()
    await asyncio.wait_for(known.wait(), 5)
    await asyncio.sleep(0)
    assert watch.is_unfit()
    await watch.close()


@pytest.mark.parametrize(
    ("facts_kept", "status"), [(None, "ok"), (1.0, "ok"), (LEAST_FACTS_KEPT - 0.1, "degraded")]
)
def test_health_reports_a_draft_that_cannot_choose(facts_kept, status):
    pools = {"gateway": 2, "speculator": 1, "prefill": 1, "decode": 1}
    health = judge(pools, facts_kept)
    assert (health.serving, health.status) == (True, status)
    assert ("generated facts" in health.reason) is (status == "degraded")
