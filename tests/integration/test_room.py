"""A small KV store under pressure: prefills wait for room, and decode computes nothing again."""

import asyncio

import pytest
import pytest_asyncio

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.errors import DeadlineExceeded
from specprefill.core.types import Span
from specprefill.kv.rpc import KvPeers

from .conftest import BLOCK_SIZE, Engines, Runner, answer, kept

TOKENS = 1000
TOKEN_BYTES = 2 * 3 * 2 * 32 * 4  # k and v, of 3 layers, 2 heads, 32 dimensions, float32
FITTING = 2  # prompts whose KV the store holds
PROMPTS = 8
TIMEOUT_S = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def small_store(model_dir):
    """Engines whose prefill worker may hold two prompts, and the service in front of it."""
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine
    from specprefill.prefill.service import PrefillService

    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    config = EngineConfig(block_size=BLOCK_SIZE, kv_cache_memory_bytes=64 << 20, enforce_eager=True)
    cap = int((FITTING + 0.5) * TOKENS * TOKEN_BYTES)
    kv = KvConfig(host="127.0.0.1", carrier="grpc", max_held_bytes=cap, pull_timeout_s=20.0)
    producer = Engine(engine_args(model, config, kv, Role.PREFILL))
    consumer = Engine(engine_args(model, config, kv, Role.DECODE))
    async with (
        PrefillService(producer, max_held_bytes=cap) as prefill,
        DecodeService(consumer) as decode,
    ):
        peers = KvPeers()
        yield Engines(Runner.V1, prefill, decode, None, producer, peers)
        await peers.close()


pytestmark = pytest.mark.asyncio(loop_scope="session")


async def test_the_size_of_kv_is_known(small_store):
    assert small_store.prefill_engine.kv_bytes_per_token() == TOKEN_BYTES


async def test_nothing_is_dropped_nor_computed_again(small_store):
    """Decode is slow: every answer is pulled only after its prefill has been held for a while."""
    whole = kept(TOKENS, Span(0, TOKENS))
    most_held, decoding = 0, asyncio.Semaphore(1)

    async def watch():
        nonlocal most_held
        while True:
            (gauges,) = await small_store.prefill.gauges()
            most_held = max(most_held, gauges.leases)
            await asyncio.sleep(0.02)

    async def ask(number):
        prompt = [300 + (number * 37 + place) % TOKENS for place in range(TOKENS)]
        request = small_store.request(prompt, max_tokens=4, ignore_eos=True)
        prefilled = await small_store.prefill.prefill(request, whole, TIMEOUT_S)
        async with decoding:
            steps = await small_store.decoded(request, whole, prefilled)
        return prefilled.queue_s, steps

    watching = asyncio.create_task(watch())
    answers = await asyncio.gather(*(ask(number) for number in range(PROMPTS)))
    watching.cancel()
    (gauges,) = await small_store.prefill.gauges()
    assert not any(step.recomputed for _, steps in answers for step in steps)
    assert all(len(answer(steps)) == 4 for _, steps in answers)
    assert gauges.dropped_total == 0
    assert 1 <= most_held <= FITTING
    assert max(queue_s for queue_s, _ in answers) > 0
    assert small_store.prefill.waiting_for_room == 0


async def test_waiting_for_room_ends_with_the_deadline(small_store):
    whole = kept(TOKENS, Span(0, TOKENS))
    requests = [
        small_store.request(range(300 + number, 300 + number + TOKENS), max_tokens=4)
        for number in range(FITTING + 1)
    ]
    held = [await small_store.prefill.prefill(each, whole, TIMEOUT_S) for each in requests[:-1]]
    with pytest.raises(DeadlineExceeded):
        await small_store.prefill.prefill(requests[-1], whole, 0.5)
    for prefilled in held:
        await small_store.peers.release(prefilled.ticket)
    last = await small_store.prefill.prefill(requests[-1], whole, TIMEOUT_S)
    await small_store.peers.release(last.ticket)
