"""The benchmark that a deployment begins with."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest

from specprefill.control.probe import Probe
from specprefill.control.stages import Curve, StageModels
from specprefill.core.errors import PrefillUnavailable
from specprefill.core.fakes import FakePrefiller, FakePrefilling, FakeSpeculator
from specprefill.core.types import Chunk, PlanKind, PrefillResult, Request, Selection, Span

SPECULATE = Curve(base_s=0.01, token_s=1e-5)
PREFILL = Curve(base_s=0.02, token_s=2e-4)


@dataclass
class TimedSpeculator:
    lengths: list[int] = field(default_factory=list)

    async def select(self, request, plan, timeout_s):
        tokens = len(request.prompt)
        self.lengths.append(tokens)
        return Selection(tokens, (Span(0, 1),), plan, speculate_s=SPECULATE.seconds(tokens))


@dataclass
class TimedPrefiller:
    lengths: list[int] = field(default_factory=list)

    @asynccontextmanager
    async def prefill(self, request, selection, timeout_s):
        assert selection.kept_tokens == len(request.prompt)
        self.lengths.append(len(request.prompt))
        seconds = PREFILL.seconds(len(request.prompt))
        chunk = Chunk(0, (1,), "a", finish_reason="length")
        yield FakePrefilling(FakePrefiller(), None, None, PrefillResult(chunk, None, 0.0, seconds))


def probe(speculator, prefiller, longest=100_000, budget_s=0.5) -> Probe:
    prompt_of = lambda tokens: Request("probe", (1,) * tokens, b"")  # noqa: E731
    return Probe(speculator, prefiller, prompt_of, longest, budget_s, timeout_s=1.0)


async def test_both_stages_are_learnt_from_growing_prompts():
    speculator, prefiller, models = TimedSpeculator(), TimedPrefiller(), StageModels()
    await probe(speculator, prefiller).run(models)
    assert speculator.lengths == [64, 512, 2048, 8192, 32768]
    assert prefiller.lengths == [64, 512]
    for tokens in (500, 2000):
        assert models.speculate.seconds(tokens) == pytest.approx(SPECULATE.seconds(tokens), rel=0.1)
    assert models.prefill.seconds(512) == pytest.approx(PREFILL.seconds(512), rel=0.1)


async def test_no_prompt_is_longer_than_the_model_reads():
    speculator, prefiller = TimedSpeculator(), TimedPrefiller()
    await probe(speculator, prefiller, longest=40).run(StageModels())
    assert (speculator.lengths, prefiller.lengths) == ([40, 40], [40, 40])


async def test_a_pool_that_is_down_is_reported():
    prefiller = FakePrefiller(fails=[PrefillUnavailable("down")])
    with pytest.raises(PrefillUnavailable):
        await probe(FakeSpeculator(), prefiller).run(StageModels())


async def test_the_prefill_is_dense_and_the_speculator_prunes():
    prefiller, plans = FakePrefiller(ends_answer=True), []

    class Speculator(TimedSpeculator):
        async def select(self, request, plan, timeout_s):
            plans.append(plan.kind)
            return await super().select(request, plan, timeout_s)

    await probe(Speculator(), prefiller).run(StageModels())
    assert set(plans) == {PlanKind.PRUNE}
    assert {selection.keep_rate for selection in prefiller.selections} == {1.0}
