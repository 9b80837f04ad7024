"""A request is planned once, with everything known, and its prompt is digested once."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import pytest

from specprefill.control.admission import AdmissionPolicy
from specprefill.control.admitting import AdmittingPipeline
from specprefill.control.from_config import net_gain, planner, selection_policy
from specprefill.control.gate import Gate
from specprefill.control.gateway_share import GatewayShare
from specprefill.core import prefix_digests
from specprefill.core.fakes import FakeDecoder, FakePrefiller, FakeSpeculator
from specprefill.core.pipeline import Pipeline
from specprefill.core.plan import Planner
from specprefill.core.types import Plan, Request
from specprefill.gateway.observe.traffic import ArrivalCounts, GatewayTraffic
from specprefill.gateway.observe.watched import LearningObserver, ObservedPipeline
from specprefill.gateway.pools.affinity import load_of, whole_load_of
from tests.contract.conftest import configuration

LONG = "The quick brown fox jumps over the lazy dog. " * 80


@dataclass
class Calls:
    plans: list[Request] = field(default_factory=list)
    digested: int = 0


class RoutedSpeculator(FakeSpeculator):
    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Any:
        assert whole_load_of(request).prefix
        return await super().select(request, plan, timeout_s)


class RoutedPrefiller(FakePrefiller):
    def prefill(self, request: Request, selection: Any, timeout_s: float) -> Any:
        load_of(request, selection)
        return super().prefill(request, selection, timeout_s)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    counted, plan, digest = Calls(), Planner.plan, prefix_digests.prefix_digests

    def planned(self: Planner, request: Request) -> Plan:
        counted.plans.append(request)
        return plan(self, request)

    def digested(*args: Any, **named: Any) -> Any:
        counted.digested += 1
        return digest(*args, **named)

    monkeypatch.setattr(Planner, "plan", planned)
    monkeypatch.setattr(prefix_digests, "prefix_digests", digested)
    monkeypatch.setattr("specprefill.gateway.openai.client.prefix_digests", digested)
    return counted


@pytest.fixture
def client(gateway: Any) -> Any:
    """A gateway's client over its admission control and observers, with fake pools."""
    del gateway  # vLLM has been imported
    from specprefill.gateway.openai.server import build_client

    config = configuration()
    gain = net_gain(config)
    pipeline = Pipeline(RoutedSpeculator(), RoutedPrefiller(), FakeDecoder())
    gate = Gate(
        AdmissionPolicy(60.0),
        per_engine=1,
        fair_keys=False,
        curves=gain.models.curves,
        engines=lambda: GatewayShare(1, 1, 1),
        now=time.monotonic,
    )
    counts = ArrivalCounts(
        GatewayTraffic(), selection_policy(config.selection, 128), time.monotonic
    )
    watched = ObservedPipeline(
        AdmittingPipeline(pipeline, gate, keep_floor=0.1), [counts, LearningObserver(gain.learn)]
    )
    made = build_client(config, watched, planner(config.selection, gain))
    yield made
    made.renderer.shutdown()


async def answer(client: Any, text: str) -> Any:
    from vllm.sampling_params import SamplingParams

    prompt = await client.render_chat([{"role": "user", "content": text}], None)
    outputs = client.generate(prompt, SamplingParams(max_tokens=4, temperature=0.0), "r")
    return [output async for output in outputs][-1]


@pytest.mark.parametrize("text", [LONG, "Short."], ids=["long", "short"])
async def test_one_plan_and_one_digest_per_request(client: Any, calls: Calls, text: str) -> None:
    for count in (1, 2):
        assert (await answer(client, text)).finished
        assert (len(calls.plans), calls.digested) == (count, count)


async def test_the_plan_is_made_when_the_protected_parts_are_known(
    client: Any, calls: Calls
) -> None:
    await answer(client, LONG)
    (planned,) = calls.plans
    assert planned.protected
    assert planned.digests is not None
