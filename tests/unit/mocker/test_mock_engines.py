"""Engines of no weights answer as real ones do: in time, by what is cached, alike everywhere."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import msgspec
import pytest

from specprefill.control.scaling.values import Engines
from specprefill.control.stages import Curve, StageCurves
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.ports import Prefilling
from specprefill.core.types import Plan, PlanKind, Reason, Request, dense_selection
from specprefill.mocker.engines import MockDecode, MockPrefill, MockSpeculator, at_speed
from tests.policies import SHIPPED

TOKEN_S = 1e-4
ENGINES = Engines(
    StageCurves(
        speculate=Curve(token_s=TOKEN_S),
        prefill=Curve(token_s=TOKEN_S),
        transfer=Curve(base_s=0.001),
        first_decode=Curve(base_s=0.001),
    ),
    output_token_s=0.01,
    decode_slots=2,
)
PLAN = Plan(PlanKind.PRUNE, Reason.DEFAULT, 0.3)


def request(prompt=range(2000), max_tokens=5, **fields) -> Request:
    sampling = msgspec.msgpack.encode({"max_tokens": max_tokens})
    return Request("r", tuple(prompt), sampling, timeout_s=10.0, **fields)


class Prefiller:
    """The port over an engine without leases."""

    def __init__(self, engine: MockPrefill) -> None:
        self._engine = engine

    def prefill(self, request_, selection, timeout_s):
        return self._Prefilling(self._engine, request_, selection)

    class _Prefilling(Prefilling):
        def __init__(self, engine, request_, selection) -> None:
            self._call = engine.prefill(request_, selection)

        async def __aenter__(self):
            return self

        async def __aexit__(self, *_):
            pass

        async def ticket(self):
            return None

        async def result(self):
            return await self._call

        def kv_arrived(self):
            pass


class Speculator(MockSpeculator):
    """The port."""

    async def select(self, request_, plan, timeout_s=1.0):
        return await super().select(request_, plan)


class Decoder(MockDecode):
    """The port."""

    def decode(self, request_, selection, ticket, replay, timeout_s=1.0):
        return super().decode(request_, selection, ticket, replay)


def pipeline() -> Pipeline:
    return Pipeline(Speculator(ENGINES, SHIPPED), Prefiller(MockPrefill(ENGINES)), Decoder(ENGINES))


@pytest.mark.parametrize("samples", [1, 3])
async def test_an_answer_has_its_tokens_each_once(samples):
    asked = Planner(enabled=True, keep=0.3, min_prompt_tokens=100).with_plan(
        request(samples=samples)
    )
    chunks = [chunk async for chunk in pipeline().generate(asked)]
    for index in range(samples):
        mine = [token for chunk in chunks if chunk.index == index for token in chunk.token_ids]
        assert mine == list(range(mine[0], mine[0] + 5))
    report = chunks[-1].report
    assert report.plan is PlanKind.PRUNE
    assert report.prefill_s >= TOKEN_S * report.kept_tokens


async def test_the_next_turn_carries_over_what_the_last_one_kept():
    speculator = MockSpeculator(ENGINES, SHIPPED)
    first = await speculator.select(request(), PLAN)
    turn = await speculator.select(request(range(2100)), PLAN)
    assert turn.carried_tokens == first.kept_tokens
    assert turn.remembered_tokens >= 1900
    assert turn.speculate_s < first.speculate_s


async def test_prompts_take_turns_and_cached_ones_little_time():
    engine, whole = MockPrefill(ENGINES), dense_selection(2000, Reason.SHORT_PROMPT)
    others = [request(range(start, start + 2000)) for start in (0, 5000)]
    first, second = await asyncio.gather(*(engine.prefill(each, whole) for each in others))
    assert second.queue_s >= 1000 * TOKEN_S  # it came while the first was computed
    again = await engine.prefill(others[0], whole)
    assert again.first.cached_tokens >= 1900
    assert again.prefill_s < first.prefill_s / 2


async def test_answers_beyond_the_slots_wait():
    decode, started_s = MockDecode(ENGINES), time.monotonic()
    selection, count = dense_selection(100, Reason.SHORT_PROMPT), 20

    async def last(number):
        asked = request(range(number, number + 100), max_tokens=count)
        async for step in decode.decode(asked, selection, None, ((),)):
            assert step.chunk.is_finished == (step.computed is not None)
        return time.monotonic() - started_s

    first, second, third = await asyncio.gather(*map(last, range(3)))
    # All of its tokens come after another answer's end.
    assert third > min(first, second) + (count - 1) * ENGINES.output_token_s


def test_faster_engines_take_less_of_everything():
    fast = at_speed(ENGINES, 10)
    assert fast.curves.prefill == Curve(token_s=TOKEN_S / 10)
    assert (fast.output_token_s, fast.decode_slots) == (0.001, 2)
    assert replace(fast, curves=ENGINES.curves, output_token_s=0.01) == ENGINES
