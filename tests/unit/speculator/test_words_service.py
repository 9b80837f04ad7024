"""Prompts are chosen by words where no model reads them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from specprefill.config import SelectionConfig, SpeculatorConfig
from specprefill.core.errors import InvalidRequest, ScoringTimeout, SpeculatorUnavailable
from specprefill.core.types import KeepRange, Plan, PlanKind, Reason, Request, Span
from specprefill.lab.evaluation.gold import survival
from specprefill.lab.evaluation.prompts import RenderedTask, Renderer
from specprefill.lab.families.catalog import generate
from specprefill.speculator.chunking import Chunker
from specprefill.speculator.scoring_gauges import SpeculatorGauges
from specprefill.speculator.self_test import self_test
from specprefill.speculator.words_service import WordsService
from tests.instruments import Instruments

WAIT_S = 60.0
PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3)
AUTOMATIC = Plan(PlanKind.PRUNE, Reason.AUTO, within=KeepRange(0.05, 1.0))
BY_WORDS = SpeculatorConfig(score_by="words")


@pytest.fixture(scope="module")
def main_path(root: Path) -> str:
    return str(root / "models" / "demo-main")


@asynccontextmanager
async def serving(main_path: str, **selection: Any) -> AsyncIterator[WordsService]:
    config = SelectionConfig(**selection)
    service = WordsService.from_config(BY_WORDS, config, main_path, 16)
    await service.start()
    try:
        yield service
    finally:
        await service.close()


def rendered(tokenizer: Any, family: str, seed: int, tokens: int = 2048) -> RenderedTask:
    return Renderer(tokenizer, 64).prompt(generate(family, seed, tokens, tokenizer))


def request_of(prompt: RenderedTask) -> Request:
    return Request("r", prompt.ids, b"", protected=prompt.protected, asked=prompt.asked)


@pytest.mark.parametrize("family", ["needles", "tool_result", "recall_5_turns", "code_needle"])
async def test_what_the_question_names_is_kept(
    main_path: str, demo_tokenizer: Any, family: str
) -> None:
    kept = []
    async with serving(main_path) as service:
        for seed in range(6):
            prompt = rendered(demo_tokenizer, family, seed)
            chosen = await service.select(request_of(prompt), PLAN, WAIT_S)
            assert chosen.keep_rate < 0.5
            kept.append(survival(prompt.gold, chosen))
    assert sum(kept) >= 5.0


async def test_the_scores_may_choose_the_rate(main_path: str, demo_tokenizer: Any) -> None:
    prompt = rendered(demo_tokenizer, "tool_result", 3)
    async with serving(main_path) as service:
        chosen = await service.select(request_of(prompt), AUTOMATIC, WAIT_S)
    assert chosen.plan.reason is Reason.AUTO
    assert chosen.keep_rate < 0.4
    assert survival(prompt.gold, chosen) == 1.0


async def test_a_next_turn_keeps_what_the_last_one_kept(
    main_path: str, demo_tokenizer: Any
) -> None:
    prompt = rendered(demo_tokenizer, "needles", 5)
    longer = (*prompt.ids, *prompt.ids[-120:])
    async with serving(main_path, whole_turn_tokens=200) as service:
        first = await service.select(request_of(prompt), PLAN, WAIT_S)
        second = await service.select(replace(request_of(prompt), prompt=longer), PLAN, WAIT_S)
    assert second.plan.reason in (Reason.CARRIED_OVER, Reason.EXTENDED)
    assert second.carried_tokens > 0.8 * first.kept_tokens


async def test_it_passes_its_own_test_and_is_measured(main_path: str) -> None:
    made = Instruments()
    async with serving(main_path) as service:
        assert service.is_running
        assert service.prefix_cache_tokens > 100_000  # conversations are led back to it
        facts_kept = await self_test(service, main_path)
        SpeculatorGauges(service, made).update()
    assert facts_kept is not None
    assert facts_kept >= 0.6
    assert made.total("specprefill_speculator_prompts_total") == 8
    assert not service.is_running


async def test_bad_calls_are_refused(main_path: str) -> None:
    async with serving(main_path) as service:
        with pytest.raises(InvalidRequest, match="empty"):
            await service.select(Request("r", (), b""), PLAN, WAIT_S)
        short = await service.select(Request("r", (5,) * 20, b""), PLAN, WAIT_S)
        assert short.plan.kind is PlanKind.DENSE
    with pytest.raises(SpeculatorUnavailable):
        await service.select(Request("r", (5,) * 2000, b""), PLAN, WAIT_S)


async def test_tokens_beyond_the_vocabulary_have_no_text(main_path: str) -> None:
    async with serving(main_path) as service:
        chosen = await service.select(Request("r", (10**6,) * 2000, b""), PLAN, WAIT_S)
    assert chosen.prompt_tokens == 2000


async def test_a_slow_prompt_is_given_up(main_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()
    chunks_of = Chunker.chunks

    def slow(chunker: Chunker, prompt: Any) -> Any:
        go_on.wait(WAIT_S)
        return chunks_of(chunker, prompt)

    monkeypatch.setattr(Chunker, "chunks", slow)
    async with serving(main_path) as service:
        asked = asyncio.create_task(
            service.select(Request("r", (5,) * 2000, b"", protected=(Span(0, 9),)), PLAN, 0.05)
        )
        with pytest.raises(ScoringTimeout):
            await asked
        assert (service.batch_size, service.counts.timeouts) == (0, 1)
        go_on.set()
