"""Text mode on real engines: the kept text is an ordinary prompt to them."""

from __future__ import annotations

from dataclasses import replace

import msgspec
import pytest
import pytest_asyncio

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.errors import InvalidRequest
from specprefill.core.types import Plan, PlanKind, PromptMode, Reason, Request, Span
from specprefill.gateway.openai.text_writer import PromptTextWriter

from .conftest import BLOCK_SIZE, Runner, answer, kept

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

RUNNERS = (Runner.V1, Runner.V2)
TEXT_PLAN = Plan(PlanKind.PRUNE, Reason.ASKED, 0.3, mode=PromptMode.TEXT)
PROSE = "A survey of harbour lights, kept by hand; page 17 names the keeper. "


def written(demo_tokenizer, request, *runs: Span):
    selection = replace(kept(len(request.prompt), *runs), plan=TEXT_PLAN)
    return PromptTextWriter(demo_tokenizer, "\n...\n").written(request.prompt, (), selection)


async def test_the_answer_is_that_of_plain_vllm_to_the_text(engines, demo_tokenizer):
    prompt = demo_tokenizer.encode(PROSE * 12, add_special_tokens=False)
    request = engines.request(prompt)
    runs = Span(0, 45), Span(70, 103), Span(len(prompt) - 40, len(prompt))
    selection = written(demo_tokenizer, request, *runs)
    assert len(selection.text) < len(prompt)
    prefilled, steps = await engines.handed_over(request, selection)
    assert prefilled.ticket is not None
    assert prefilled.ticket.tokens == len(selection.text) - 1
    assert not steps[-1].recomputed
    plain = await engines.plain_vllm(engines.request(selection.text))
    assert answer(steps) == list(plain.token_ids)
    sparse = await engines.aggregated(request, kept(len(prompt), *runs))
    assert answer(steps) != list(sparse.token_ids), "the modes give one answer"


async def test_its_blocks_are_shared_with_ordinary_prompts(engines, demo_tokenizer):
    prompt = demo_tokenizer.encode("Blocks. " + PROSE * 12, add_special_tokens=False)
    request = engines.request(prompt)
    selection = written(demo_tokenizer, request, Span(0, 40), Span(90, len(prompt)))
    await engines.handed_over(request, selection)
    dense = engines.request(selection.text)
    whole = kept(len(selection.text), Span(0, len(selection.text)))
    prefilled, steps = await engines.handed_over(dense, whole)
    assert prefilled.first.cached_tokens >= len(selection.text) - 2 * 32
    assert len(answer(steps)) == engines.answer_tokens


@pytest.fixture(scope="module")
def alibi(demo_tokenizer, tmp_path_factory):
    """A random Falcon with ALiBi, which has no positions to keep, and its folder."""
    import torch
    from transformers import FalconConfig, FalconForCausalLM

    folder = str(tmp_path_factory.mktemp("tiny-falcon"))
    torch.manual_seed(0)
    config = FalconConfig(
        vocab_size=len(demo_tokenizer), hidden_size=128, num_hidden_layers=2,
        num_attention_heads=4, alibi=True, multi_query=True, parallel_attn=True, bias=False,
        initializer_range=0.2, eos_token_id=demo_tokenizer.eos_token_id,
        bos_token_id=demo_tokenizer.eos_token_id,
    )  # fmt: skip
    model = FalconForCausalLM(config).eval()
    model.save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    return model, folder


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def alone(alibi):
    """A decode engine that takes no KV over, as where the model's cannot be."""
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    model = MainModel(path=alibi[1], dtype="float32", max_model_len=1024)
    config = EngineConfig(block_size=BLOCK_SIZE, kv_cache_memory_bytes=16 << 20, enforce_eager=True)
    args = engine_args(model, config, KvConfig(), Role.DECODE, hands_over=False)
    async with DecodeService(Engine(args)) as decode:
        yield decode


def asked(prompt, samples: int = 1, **sampling) -> Request:
    from vllm import SamplingParams

    given = {"temperature": 0.0, "max_tokens": 12, **sampling}
    wire = msgspec.msgpack.encode(SamplingParams(**given))
    return Request(f"a{id(given)}", tuple(prompt), wire, samples=samples, timeout_s=60.0)


def transformers_answer(model, prompt, tokens: int) -> list[int]:
    import torch

    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False
        )
    return found[0, len(prompt) :].tolist()


async def test_a_model_without_positions_answers_the_text(alibi, alone, demo_tokenizer):
    prompt = demo_tokenizer.encode(PROSE * 10, add_special_tokens=False)
    request = asked(prompt, samples=2)
    selection = written(demo_tokenizer, request, Span(0, 45), Span(70, len(prompt)))
    steps = [step async for step in alone.decode(request, selection, None, ((), ()), 60.0)]
    wanted = transformers_answer(alibi[0], list(selection.text), 12)
    assert [answer(steps, index) for index in range(2)] == [wanted, wanted]
    last = [step for step in steps if step.chunk.is_finished]
    assert all(step.computed is not None and step.computed.prefill_s > 0 for step in last)


async def test_logprobs_of_a_prompt_that_decode_computes(alone, demo_tokenizer):
    prompt = demo_tokenizer.encode(PROSE, add_special_tokens=False)
    request = asked(prompt, samples=2, prompt_logprobs=1)
    whole = kept(len(prompt), Span(0, len(prompt)))
    steps = [step async for step in alone.decode(request, whole, None, ((), ()), 60.0)]
    found = [each for step in steps if (each := step.chunk.prompt_logprobs) is not None]
    assert len(found) == 1
    assert len(found[0]) == len(prompt)
    assert found[0][0] is None
    assert found[0][1][0].token_id == prompt[1]


async def test_positions_that_the_model_does_not_have_are_refused(alone, demo_tokenizer):
    prompt = demo_tokenizer.encode(PROSE, add_special_tokens=False)
    request = asked(prompt)
    selection = kept(len(prompt), Span(0, 4), Span(8, len(prompt)))
    with pytest.raises(InvalidRequest, match="positions: the engine's model has none"):
        async for _ in alone.decode(request, selection, None, ((),), 60.0):
            pass
