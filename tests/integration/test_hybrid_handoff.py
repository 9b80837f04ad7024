"""Hybrids: attention at original positions, states handed over at the last block boundary."""

import asyncio
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
import pytest_asyncio

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.types import Span
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.kv.rpc import KvPeers
from specprefill.prefill.service import PrefillService

from .conftest import MODELS, V2_THOROUGHLY, Engines, answer, kept, prompt_of, starting

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

STEPS = 6
BLOCK = 128  # what vLLM makes of these states and heads
CASES = {
    "less_than_a_block": (300, (Span(0, 40), Span(250, 300))),
    "a_block_and_one": (500, (Span(0, 100), Span(471, 500))),
    "whole_blocks": (600, (Span(0, 128), Span(300, 428))),
    "several_chunks": (1500, (Span(0, 4), Span(32, 64), Span(500, 900), Span(1400, 1500))),
}


@pytest.fixture(scope="module")
def hybrid_model(tmp_path_factory):
    """A random Granite 4: Mamba2, attention with rope, Mamba2; experts."""
    import torch
    from transformers import AutoTokenizer, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    folder = str(tmp_path_factory.mktemp("tiny-granite"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "demo-main")
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        layer_types=["mamba", "attention", "mamba"],
        num_attention_heads=4,
        num_key_value_heads=2,
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_d_state=16,
        mamba_n_groups=1,
        num_local_experts=4,
        num_experts_per_tok=2,
        shared_intermediate_size=64,
        position_embedding_type="rope",
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
    )
    GraniteMoeHybridForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(hybrid_model):
    """transformers on the kept tokens, in order, at explicit positions; whole, step by step."""
    import torch
    from transformers import DynamicCache, GraniteMoeHybridForCausalLM

    model = GraniteMoeHybridForCausalLM.from_pretrained(hybrid_model, dtype=torch.float32)

    def generate(prompt, selection):
        positions = [p for run in selection.runs for p in range(run.start, run.stop)]
        ids, tokens = [prompt[p] for p in positions], []
        with torch.inference_mode():
            for step in range(STEPS):
                logits = model(
                    input_ids=torch.tensor([ids]),
                    position_ids=torch.tensor([positions]),
                    past_key_values=DynamicCache(config=model.config),
                ).logits
                tokens.append(int(logits[0, -1].argmax()))
                ids, positions = [*ids, tokens[-1]], [*positions, len(prompt) + step]
        return tokens

    return generate


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=V2_THOROUGHLY)
async def hybrids(request, hybrid_model):
    """A prefill and a decode engine on each model runner."""
    model = MainModel(path=hybrid_model, dtype="float32", max_model_len=2048)
    config = EngineConfig(
        kv_cache_memory_bytes=64 << 20, enforce_eager=True, max_num_batched_tokens=512
    )
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=20.0, carrier="grpc", max_held_bytes=64 << 20)
    async with AsyncExitStack() as stack:
        with starting(request.param):
            producer = Engine(engine_args(model, config, kv, Role.PREFILL))
            prefill = PrefillService(producer)
            decode = DecodeService(Engine(engine_args(model, config, kv, Role.DECODE)))
            for service in (prefill, decode):
                stack.push_async_callback(service.close)
            await asyncio.gather(prefill.start(), decode.start())
        peers = KvPeers(None)
        yield Engines(request.param, prefill, decode, None, producer, peers)
        await peers.close()


def job(case):
    length, runs = CASES[case]
    return prompt_of(length, seed=length), kept(length, *runs)


async def test_a_mixed_batch_through_the_hand_off_equals_transformers(hybrids, expected):
    jobs = [job(case) for case in CASES]
    requests = [hybrids.request(prompt, ignore_eos=True, max_tokens=STEPS) for prompt, _ in jobs]
    answers = await asyncio.gather(
        *(
            hybrids.handed_over(request, selection)
            for request, (_, selection) in zip(requests, jobs, strict=True)
        )
    )
    for (prompt, selection), (prefilled, steps) in zip(jobs, answers, strict=True):
        assert answer(steps) == expected(prompt, selection)
        assert answer(steps)[:1] == list(prefilled.first.token_ids)
        assert not any(step.recomputed for step in steps)
        handed = (selection.kept_tokens - 1) // BLOCK * BLOCK
        assert prefilled.ticket.tokens == handed
        assert (steps[-1].transfer_s is not None and steps[-1].transfer_s > 0) == (handed > 0)
    assert [gauges.leases for gauges in await hybrids.prefill.gauges()] == [0]


async def test_a_repeated_prompt_hits_keys_and_states_alike(hybrids, expected):
    """Warm on both sides, with the state at the last boundary from the cache."""
    prompt, selection = job("several_chunks")
    prompt = [prompt[0] + 1, *prompt[1:]]
    request = hybrids.request(prompt, ignore_eos=True, max_tokens=STEPS)
    cold, _ = await hybrids.handed_over(request, selection)
    warm, steps = await hybrids.handed_over(request, selection)
    assert cold.first.cached_tokens == 0
    assert warm.first.cached_tokens == (selection.kept_tokens - 1) // BLOCK * BLOCK
    assert answer(steps) == expected(prompt, selection)


async def test_other_positions_of_the_same_tokens_never_hit(hybrids, expected):
    prompt, selection = job("several_chunks")
    prompt = [prompt[0] + 2, *prompt[1:]]
    await hybrids.handed_over(hybrids.request(prompt, ignore_eos=True, max_tokens=STEPS), selection)
    packed = selection.engine_prompt(tuple(prompt))
    whole = kept(len(packed), Span(0, len(packed)))
    request = hybrids.request(packed, ignore_eos=True, max_tokens=STEPS)
    prefilled, steps = await hybrids.handed_over(request, whole)
    assert prefilled.first.cached_tokens == 0  # the first block already has a gap
    assert answer(steps) == expected(packed, whole)
    assert expected(packed, whole) != expected(prompt, selection)


async def test_a_failed_pull_is_recomputed_at_the_same_positions(hybrids, expected):
    prompt, selection = job("several_chunks")
    prompt = [prompt[0] + 3, *prompt[1:]]
    request = hybrids.request(prompt, ignore_eos=True, max_tokens=STEPS)
    prefilled = await hybrids.prefill.prefill(request, selection, 60.0)
    lost = replace(prefilled.ticket, lease=replace(prefilled.ticket.lease, id="0" * 32))
    steps = await hybrids.decoded(request, selection, replace(prefilled, ticket=lost))
    assert answer(steps) == expected(prompt, selection)
    assert steps[-1].recomputed
    await hybrids.peers.release(prefilled.ticket)
