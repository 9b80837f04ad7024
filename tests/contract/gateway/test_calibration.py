"""The probe in the background, with the requests that engines get."""

from __future__ import annotations

import asyncio
import random

import msgspec
import pytest

from specprefill.control.probe import Probe
from specprefill.control.stages import StageModels
from specprefill.core.errors import PrefillUnavailable
from specprefill.core.fakes import FakePrefiller, FakeSpeculator
from specprefill.gateway.observe import calibration


def of(prefiller: FakePrefiller) -> tuple[calibration.Calibration, StageModels]:
    prompts = calibration.ProbePrompts(100, random.Random(1))
    models = StageModels()
    probe = Probe(FakeSpeculator(), prefiller, prompts, longest=600, budget_s=1.0, timeout_s=1.0)
    return calibration.Calibration(probe, models), models


async def test_a_deployment_is_measured():
    prefiller = FakePrefiller(ends_answer=True)
    running, models = of(prefiller)
    await running.run()
    assert models.prefill.seconds(512) == pytest.approx(0.5, rel=0.1)
    assert models.speculate.seconds(512) == pytest.approx(0.25, rel=0.1)


async def test_a_pool_that_is_not_up_yet_is_asked_again(monkeypatch):
    monkeypatch.setattr(calibration, "PAUSE_S", 0.0)
    running, models = of(FakePrefiller(fails=[PrefillUnavailable("starting")], ends_answer=True))
    await running.run()
    assert models.prefill.samples_seen > 0


async def test_closing_stops_it():
    running, models = of(FakePrefiller(fails=[PrefillUnavailable("down")] * 1000))
    running.start()
    await asyncio.sleep(0)
    await running.close()
    await running.close()
    assert models.prefill.samples_seen == 0


def test_prompts_are_all_different_and_answered_with_one_token():
    prompts = calibration.ProbePrompts(50, random.Random(1))
    first, second = prompts(300), prompts(300)
    assert first.prompt[:32] != second.prompt[:32]
    assert set(first.prompt) <= set(range(50))
    sampling = msgspec.msgpack.decode(first.sampling)
    assert (sampling["max_tokens"], sampling["temperature"]) == (1, 0.0)
