"""Sampled requests are answered again, dense, and the difference is counted."""

from __future__ import annotations

import msgspec
import pytest
from prometheus_client import REGISTRY
from vllm.sampling_params import SamplingParams

from specprefill.config import QualityConfig
from specprefill.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.gateway import shadowing
from specprefill.gateway.metrics import MeasuredPipeline
from specprefill.pipeline import Pipeline
from specprefill.plan import Planner
from specprefill.shadow import Divergence, Outcome
from specprefill.types import Controls, Request


def request(temperature: float = 0.0, **controls) -> Request:
    sampling = msgspec.msgpack.encode(SamplingParams(temperature=temperature, max_tokens=4))
    asked = Controls(**(controls or {"keep": 0.2}))
    return Request("r", tuple(range(100, 200)), sampling, controls=asked)


class Rig:
    def __init__(self, **quality):
        self.prefiller = FakePrefiller()
        planner = Planner(enabled=True, keep=0.5, min_prompt_tokens=50)
        pipeline = Pipeline(FakeSpeculator(), self.prefiller, FakeDecoder(), planner)
        config = QualityConfig(**{"shadow_share": 1.0, **quality})
        self.shadowed = shadowing.ShadowedPipeline(MeasuredPipeline(pipeline), pipeline, config)

    async def run(self, asked: Request) -> list[float]:
        """The keep rates of all prefills: the live one, and that of the copy."""
        assert [chunk async for chunk in self.shadowed.generate(asked)]
        await self.shadowed._shadow.settled()
        await self.shadowed.close()
        return [selection.keep_rate for selection in self.prefiller.selections]


def value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_a_pruned_answer_gets_a_dense_copy():
    before = value("specprefill_shadow_total", outcome="equal", keep_rate="0.2")
    assert await Rig().run(request()) == [0.2, 1.0]
    after = value("specprefill_shadow_total", outcome="equal", keep_rate="0.2")
    assert after - before == 1


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


async def test_a_busy_gateway_drops_copies():
    rig = Rig(shadow_most_live=1)
    first = rig.shadowed.generate(request())
    second = rig.shadowed.generate(request())
    await anext(first)
    await anext(second)
    before = value("specprefill_shadow_total", outcome="dropped", keep_rate="0.2")
    third = rig.shadowed.generate(request())
    assert [chunk async for chunk in third]
    assert value("specprefill_shadow_total", outcome="dropped", keep_rate="0.2") - before == 1
    await first.aclose()
    await second.aclose()


def test_the_copy_asks_for_candidates():
    copy = shadowing.dense_copy(request())
    assert msgspec.msgpack.decode(copy.sampling)["logprobs"] == shadowing.CANDIDATES
    assert copy.controls == Controls(prune=False)
    assert copy.request_id == "shadow-r"


def test_differences_are_counted_by_keep_rate():
    names = ("agreement_ratio", "first_difference_tokens", "logprob_gap_nats")
    before = [value(f"specprefill_shadow_{name}_sum", keep_rate="0.3") for name in names]
    shadowing.record(Outcome.DIFFERENT, 0.21, Divergence(8, 4, 2, 1.5))
    shadowing.record(Outcome.FAILED, 0.3, None)
    after = [value(f"specprefill_shadow_{name}_sum", keep_rate="0.3") for name in names]
    assert [b - a for a, b in zip(before, after, strict=True)] == [0.25, 2.0, 1.5]
    assert value("specprefill_shadow_total", outcome="failed", keep_rate="0.3") >= 1
