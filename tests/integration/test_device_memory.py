"""KV that stays where the prefill engine's device has it, until the decode engine reads it.

On a CPU that memory is the host's; everything else is as on a GPU: the registered memory, the
descriptors, the reads, the order of copies.
"""

from __future__ import annotations

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.types import Span
from specprefill.kv.rpc import KvPeers

from .conftest import BLOCK_SIZE, Engines, Runner, answer, kept, prompt_of

LENGTHS = (150, 1300)  # one chunk, three chunks


async def test_the_hand_over_equals_one_engine(model_dir):
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine
    from specprefill.prefill.service import PrefillService

    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        max_num_batched_tokens=512,
    )
    kv = KvConfig(host="127.0.0.1", carrier="nixl", memory="device", max_held_bytes=64 << 20)
    producer = Engine(engine_args(model, config, kv, Role.PREFILL))
    consumer = Engine(engine_args(model, config, kv, Role.DECODE))
    async with PrefillService(producer) as prefill, DecodeService(consumer) as decode:
        engines = Engines(Runner.V1, prefill, decode, None, producer, KvPeers())
        for length in LENGTHS:
            request = engines.request(prompt_of(length, seed=length), ignore_eos=True)
            for runs in ((Span(0, 40), Span(length - 50, length)), (Span(0, length),)):
                want = await engines.aggregated(request, kept(length, *runs))
                _, steps = await engines.handed_over(request, kept(length, *runs))
                assert answer(steps) == list(want.token_ids)
                assert not steps[-1].recomputed
        assert all(one.bytes_held == 0 for one in await prefill.gauges())
        await engines.peers.close()
