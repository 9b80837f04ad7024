"""Prefills that lose their blocks half-way hand their KV over like any other.

The cache of this prefill engine holds two of the prompts and a half, and its scheduler admits
four of them at once: vLLM preempts prefills in the middle and starts them again.
"""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import pytest_asyncio
from prometheus_client import REGISTRY

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.types import Span
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.kv.tls import read_tls
from specprefill.prefill.service import PrefillService

from .conftest import BLOCK_SIZE, V2_THOROUGHLY, answer, kept, prompt_of, starting

RUNNERS = V2_THOROUGHLY

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

PROMPT = 1000
BLOCKS = 80  # 2560 tokens
BLOCK_BYTES = 3 * BLOCK_SIZE * 2 * 2 * 32 * 4  # layers, tokens, heads, k and v, dim, float32


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tight(engines, model_dir, kv_tls):
    """A prefill engine under KV pressure, on the same runner as `engines`."""
    model = MainModel(path=model_dir, dtype="float32", max_model_len=2048)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=BLOCKS * BLOCK_BYTES,
        enforce_eager=True,
        max_num_batched_tokens=512,
        engine_args={"long_prefill_token_threshold": 128},  # several prompts side by side
    )
    kv = KvConfig(host="127.0.0.1", carrier="nixl", tls=kv_tls)
    async with AsyncExitStack() as stack:
        with starting(engines.runner):
            engine = Engine(engine_args(model, config, kv, Role.PREFILL))
            service = PrefillService(engine, read_tls(kv_tls))
            await stack.enter_async_context(service)
        yield replace(engines, prefill=service, prefill_engine=engine)


def preemptions():
    """Return how often the engine that was started last has preempted a request."""
    samples = [one for metric in REGISTRY.collect() for one in metric.samples]
    return sum(one.value for one in samples if one.name == "vllm:num_preemptions_total")


SELECTIONS = {
    "dense": (PROMPT, (Span(0, PROMPT),)),
    "pruned": (2 * PROMPT, (Span(0, 40), Span(100, 700), Span(1640, 2000))),
}


@pytest.mark.parametrize("case", SELECTIONS)
async def test_preempted_prefills_hand_over_without_recomputation(engines, tight, case):
    length, runs = SELECTIONS[case]
    selection = kept(length, *runs)
    requests = [
        tight.request(prompt_of(length, seed), max_tokens=4, ignore_eos=True) for seed in range(4)
    ]
    wanted = [await engines.aggregated(request, selection) for request in requests]
    before = preemptions()
    results = await asyncio.gather(*(tight.handed_over(request, selection) for request in requests))
    assert preemptions() > before
    for (_, steps), want in zip(results, wanted, strict=True):
        assert answer(steps) == list(want.token_ids)
    assert [any(step.recomputed for step in steps) for _, steps in results] == [False] * 4
    assert [gauges.leases for gauges in await tight.prefill.gauges()] == [0]


async def test_answers_that_are_preempted_go_on_at_their_positions(engines, tight):
    """Four prompts fill the cache but for a few blocks; the answers need more."""
    selection = kept(PROMPT, Span(0, 240), Span(400, 640), Span(880, PROMPT))
    requests = [
        tight.request(prompt_of(PROMPT, seed), max_tokens=16, ignore_eos=True)
        for seed in range(10, 14)
    ]
    wanted = [await engines.aggregated(request, selection) for request in requests]
    before = preemptions()
    got = await asyncio.gather(*(tight.aggregated(request, selection) for request in requests))
    assert preemptions() > before
    assert [list(one.token_ids) for one in got] == [list(want.token_ids) for want in wanted]
