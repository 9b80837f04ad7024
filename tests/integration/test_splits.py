"""Engines that split the model differently hand KV over: pipeline stages, tensor ranks."""

import asyncio
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.types import Span
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.prefill.service import PrefillService

from .conftest import BLOCK_SIZE, answer, kept

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

SIZES = {
    "block_size": BLOCK_SIZE,
    "kv_cache_memory_bytes": 64 << 20,
    "enforce_eager": True,
    "max_num_batched_tokens": 512,  # prompts beyond it are prefilled in chunks
}
STAGES = EngineConfig(**SIZES, pipeline_parallel_size=2, executor="mp")  # 2 and 1 layers
RANKS = EngineConfig(**SIZES, tensor_parallel_size=2, executor="mp")  # one KV head each


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def split_engines(model_dir):
    """Prefill over two pipeline stages, decode over two tensor-parallel ranks."""
    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=5.0, carrier="grpc", max_held_bytes=64 << 20)
    prefill = PrefillService(Engine(engine_args(model, STAGES, kv, Role.PREFILL, peer=RANKS)))
    decode = DecodeService(Engine(engine_args(model, RANKS, kv, Role.DECODE, peer=STAGES)))
    async with AsyncExitStack() as stack:
        for service in (prefill, decode):
            stack.push_async_callback(service.close)
        await asyncio.gather(prefill.start(), decode.start())
        yield prefill, decode


@pytest.mark.parametrize(
    "selection",
    [
        kept(1300, Span(0, 1300)),
        kept(1300, Span(0, 40), Span(100, 800), Span(1230, 1300)),
    ],
    ids=["dense", "pruned"],
)
async def test_stages_hand_over_to_tensor_ranks(engines, split_engines, selection):
    prefill, decode = split_engines
    prompt = [(7 * place) % 900 + 10 for place in range(1300)]
    request = engines.request(prompt, ignore_eos=True, samples=2)
    want = await engines.aggregated(request, selection)
    prefilled = await prefill.prefill(request, selection, 60.0)
    assert len(prefilled.ticket.endpoints) == 2
    first = (prefilled.first.token_ids, ())
    steps = [s async for s in decode.decode(request, selection, prefilled.ticket, first, 60.0)]
    for index in range(2):
        assert answer(steps, index) == list(want.token_ids)
    assert not any(step.recomputed for step in steps)
    await prefill.release(prefilled.ticket)
    assert [gauges.leases for gauges in await prefill.gauges()] == [0, 0]
