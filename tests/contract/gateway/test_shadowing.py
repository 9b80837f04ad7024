"""Sampled requests are answered again, dense, and the difference is counted."""

from __future__ import annotations

import msgspec
import pytest
from vllm.sampling_params import SamplingParams

from specprefill.config import QualityConfig
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator, PlannedPipeline
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Controls, Request
from specprefill.gateway.observe import shadowing
from specprefill.gateway.observe.shadow import Divergence, ShadowOutcome
from specprefill.gateway.observe.watched import ObservedPipeline
from tests.instruments import Instruments


def request(temperature: float = 0.0, **controls) -> Request:
    sampling = msgspec.msgpack.encode(SamplingParams(temperature=temperature, max_tokens=4))
    asked = Controls(**(controls or {"keep": 0.2}))
    return Request("r", tuple(range(100, 200)), sampling, controls=asked)


class Rig:
    def __init__(self, max_model_len=None, **quality):
        self.prefiller = FakePrefiller()
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
        pipeline = Pipeline(FakeSpeculator(), self.prefiller, FakeDecoder())
        config = QualityConfig(**{"shadow_share": 1.0, **quality})
        self.counted = Instruments()
        compared = shadowing.ShadowMetrics(self.counted)
        self.shadowing = shadowing.ShadowSampler(pipeline, config, compared, max_model_len)
        self.shadowed = PlannedPipeline(ObservedPipeline(pipeline, [self.shadowing]), planner)

    async def run(self, asked: Request) -> list[float]:
        """The keep rates of all prefills: the live one, and that of the copy."""
        assert [chunk async for chunk in self.shadowed.generate(asked)]
        await self.shadowing._shadow.wait_until_idle()
        await self.shadowing.close()
        return [selection.keep_rate for selection in self.prefiller.selections]


async def test_a_pruned_answer_gets_a_dense_copy():
    rig = Rig()
    assert await rig.run(request()) == [0.2, 1.0]
    assert rig.counted.total("specprefill_shadow_total", "equal", "0.2") == 1


@pytest.mark.parametrize(
    ("asked", "quality", "rates"),
    [
        (request(prune=False), {}, [1.0]),
        (request(temperature=0.7), {}, [0.2]),
        (request(), {"shadow_share": 0.0}, [0.2]),
    ],
)
async def test_dense_random_and_unsampled_answers_get_none(asked, quality, rates):
    assert await Rig(**quality).run(asked) == rates


@pytest.mark.parametrize(("max_model_len", "rates"), [(104, [0.2]), (105, [0.2, 1.0])])
async def test_what_no_engine_can_answer_dense_gets_no_copy(max_model_len, rates):
    rig = Rig(max_model_len)
    assert await rig.run(request()) == rates  # a prompt of 100 tokens, an answer of 4
    assert rig.counted.total("specprefill_shadow_total", "failed", "0.2") == 0


async def test_a_busy_gateway_drops_copies():
    rig = Rig(shadow_most_live=1)
    first = rig.shadowed.generate(request())
    second = rig.shadowed.generate(request())
    await anext(first)
    await anext(second)
    third = rig.shadowed.generate(request())
    assert [chunk async for chunk in third]
    assert rig.counted.total("specprefill_shadow_total", "dropped", "0.2") == 1
    await first.aclose()
    await second.aclose()


def test_the_copy_asks_for_candidates():
    copy = shadowing.dense_copy(request())
    assert msgspec.msgpack.decode(copy.sampling)["logprobs"] == shadowing.CANDIDATES
    assert copy.controls == Controls(prune=False)
    assert copy.request_id == "shadow-r"


def test_differences_are_counted_by_keep_rate():
    names = ("agreement_ratio", "first_difference_tokens", "logprob_gap_nats")
    counted = Instruments()
    compared = shadowing.ShadowMetrics(counted)
    compared.record(ShadowOutcome.DIFFERENT, 0.21, Divergence(8, 4, 2, 1.5))
    compared.record(ShadowOutcome.FAILED, 0.3, None)
    sums = [counted.total(f"specprefill_shadow_{name}", "0.3") for name in names]
    assert sums == [0.25, 2.0, 1.5]
    assert counted.total("specprefill_shadow_total", "failed", "0.3") == 1
