"""MLA: engines with different tensor-parallel sizes hand latents over, and keep positions."""

import asyncio
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.types import Span
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.kv.holding import hold_lease
from specprefill.kv.rpc import KvPeers
from specprefill.prefill.service import PrefillService

from .conftest import MODELS, Engines, Runner, answer, greedy_reference, kept, prompt_of, starting

# Behind the whole suite, vLLM's own CPU platform makes the engines' configuration, which leaves
# its rotary kernel on: the worker corrects that, whichever platform it was.
pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

LENGTH = 2048
STEPS = 8
ONE = EngineConfig(kv_cache_memory_bytes=64 << 20, enforce_eager=True)
RANKS = ONE.model_copy(update={"tensor_parallel_size": 2, "executor": "mp"})
CASES = {
    "whole": (100, (Span(0, 100),)),
    "gaps": (700, (Span(0, 40), Span(100, 229), Span(333, 400), Span(690, 700))),
    "first_tokens_dropped": (300, (Span(10, 42), Span(50, 51), Span(290, 300))),
    "long_gaps": (1900, tuple(Span(start, start + 33) for start in range(0, 1900, 190))),
}


@pytest.fixture(scope="module")
def latent_model(tmp_path_factory):
    """A random DeepSeek-V2 without experts; the latent has the size that CPUs support.

    vLLM compiles the choice of experts in the first step, which may take as long as a pull may.
    """
    import torch
    from transformers import AutoTokenizer, DeepseekV2Config, DeepseekV2ForCausalLM

    folder = str(tmp_path_factory.mktemp("tiny-deepseek"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "demo-main")
    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=48,
        kv_lora_rank=512,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=32,
        first_k_dense_replace=3,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
    )
    DeepseekV2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(latent_model):
    """Greedy decoding by transformers at explicit positions."""
    import torch
    from transformers import DeepseekV2ForCausalLM

    return greedy_reference(
        DeepseekV2ForCausalLM.from_pretrained(latent_model, dtype=torch.float32)
    )


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def latent_engines(latent_model):
    """Prefill on one worker; decode over two ranks, each of which holds every latent."""
    model = MainModel(path=latent_model, dtype="float32", max_model_len=LENGTH)
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=20.0, carrier="grpc", max_held_bytes=64 << 20)
    with starting(Runner.V1):
        producer = Engine(engine_args(model, ONE, kv, Role.PREFILL, peer=RANKS))
        prefill = PrefillService(producer)
        decode = DecodeService(Engine(engine_args(model, RANKS, kv, Role.DECODE, peer=ONE)))
        async with AsyncExitStack() as stack:
            for service in (prefill, decode):
                stack.push_async_callback(service.close)
            await asyncio.gather(prefill.start(), decode.start())
            peers = KvPeers()
            stack.push_async_callback(peers.close)
            yield Engines(Runner.V1, prefill, decode, None, producer, peers)


async def test_a_mixed_batch_of_latents_handed_over_equals_transformers(latent_engines, expected):
    jobs = [
        (prompt_of(length, seed), kept(length, *runs))
        for seed, (length, runs) in enumerate(CASES.values())
    ]

    async def answered(prompt, selection):
        request = latent_engines.request(prompt, ignore_eos=True, max_tokens=STEPS)
        prefilled = await latent_engines.prefill.prefill(request, selection, 60.0)
        first = (prefilled.first.token_ids,)
        decoding = latent_engines.decode.decode(request, selection, prefilled.ticket, first, 60.0)
        # The first step of two ranks may take longer than a lease that nobody renews.
        async with hold_lease(prefilled.ticket, latent_engines.peers):
            return prefilled, [step async for step in decoding]

    answers = await asyncio.gather(*(answered(*job) for job in jobs))
    assert {
        name: (list(prefilled.first.token_ids), answer(steps))
        for name, (prefilled, steps) in zip(CASES, answers, strict=True)
    } == {
        name: (tokens[:1], tokens)
        for name, job in zip(CASES, jobs, strict=True)
        for tokens in [expected(*job, STEPS)]
    }
    assert not any(step.recomputed for _, steps in answers for step in steps)
    # A latent of 576 numbers a layer, on whichever rank: not one a head.
    assert latent_engines.prefill_engine.kv_bytes_per_token() == 3 * 576 * 4
