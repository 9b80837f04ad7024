"""LoRA adapters on both engines: pruned answers equal transformers with the merged weights."""

import json
from dataclasses import replace

import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, save_file

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.errors import EngineStartFailed
from specprefill.core.types import Span
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.kv.rpc import KvPeers
from specprefill.prefill.service import PrefillService

from .conftest import (
    BLOCK_SIZE,
    V2_THOROUGHLY,
    Engines,
    answer,
    greedy_reference,
    kept,
    prompt_of,
    starting,
)

pytestmark = [pytest.mark.integration, pytest.mark.asyncio(loop_scope="session")]

RANK, ALPHA = 4, 12
ADAPTED = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
PROMPT, RUNS = 700, (Span(0, 40), Span(100, 229), Span(333, 400), Span(690, 700))
NAMES = ("first", "second", None)


@pytest.fixture(scope="module")
def merged(model_dir):
    """The model, and how to add an adapter's matrices to it."""
    from transformers import LlamaForCausalLM

    def load(folder=None):
        model = LlamaForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        if folder is not None:
            matrices = load_file(folder / "adapter_model.safetensors")
            for name, module in model.named_modules():
                low = matrices.get(f"base_model.model.{name}.lora_A.weight")
                if low is not None:
                    high = matrices[f"base_model.model.{name}.lora_B.weight"]
                    module.weight.data += ALPHA / RANK * (high @ low)
        return model

    return load


@pytest.fixture(scope="module")
def adapters(merged, tmp_path_factory):
    """The folders of two adapters, by name."""
    model, folders = merged(), {}
    for seed, name in enumerate(NAMES[:2]):
        generator, matrices = torch.Generator().manual_seed(seed), {}
        for path, module in model.named_modules():
            if path.endswith(ADAPTED):
                rows, columns = module.weight.shape
                for part, shape in (("A", (RANK, columns)), ("B", (rows, RANK))):
                    key = f"base_model.model.{path}.lora_{part}.weight"
                    matrices[key] = 0.1 * torch.randn(shape, generator=generator)
        folders[name] = tmp_path_factory.mktemp(name)
        settings = {
            "peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none",
            "target_modules": sorted(each.rpartition(".")[2] for each in ADAPTED),
        }  # fmt: skip
        (folders[name] / "adapter_config.json").write_text(json.dumps(settings))
        save_file(matrices, folders[name] / "adapter_model.safetensors")
    return folders


@pytest_asyncio.fixture(scope="module", loop_scope="session", params=V2_THOROUGHLY)
async def adapting(request, model_dir, adapters):
    """A prefill and a decode engine with both adapters."""
    paths = {name: str(folder) for name, folder in adapters.items()}
    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192, adapters=paths)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        max_num_batched_tokens=512,
    )
    kv = KvConfig(host="127.0.0.1", carrier="grpc", pull_timeout_s=20.0)
    with starting(request.param):
        producer = Engine(engine_args(model, config, kv, Role.PREFILL), adapters=paths)
        consumer = Engine(engine_args(model, config, kv, Role.DECODE), adapters=paths)
        prefill, decode = PrefillService(producer), DecodeService(consumer)
        await prefill.start()
        await decode.start()
    peers = KvPeers()
    yield Engines(request.param, prefill, decode, None, producer, peers)
    await peers.close()
    await decode.close()
    await prefill.close()


async def test_every_adapter_is_loaded_before_the_first_request(adapting):
    for service in (adapting.prefill, adapting.decode):
        assert set(await service._engine._llm.list_loras()) == {1, 2}


async def test_a_pruned_answer_is_the_adapters_own(adapting, adapters, merged):
    """One prompt for all: what one adapter computed would show in another's answer."""
    prompt, selection = prompt_of(PROMPT), kept(PROMPT, *RUNS)
    answers = {}
    for name in NAMES:
        request = replace(adapting.request(prompt, ignore_eos=True), adapter=name)
        _, steps = await adapting.handed_over(request, selection)
        assert not steps[-1].recomputed
        answers[name] = answer(steps)
        reference = greedy_reference(merged(adapters.get(name)))
        assert answers[name] == reference(prompt, selection, adapting.answer_tokens)
    assert len({tuple(tokens) for tokens in answers.values()}) == len(NAMES)


async def test_only_the_same_adapter_finds_what_was_computed(adapting):
    prompt, selection = prompt_of(PROMPT, seed=9), kept(PROMPT, *RUNS)

    async def cached(name):
        request = replace(adapting.request(prompt), adapter=name)
        prefilled, _ = await adapting.handed_over(request, selection)
        return prefilled.first.cached_tokens

    whole_blocks = (selection.kept_tokens - 1) // BLOCK_SIZE * BLOCK_SIZE
    assert [await cached(name) for name in NAMES] == [0, 0, 0]
    assert [await cached(name) for name in NAMES] == [whole_blocks] * 3


@pytest.mark.parametrize("fault", ["other_shapes", "no_weights"])
async def test_an_adapter_that_vllm_cannot_load_fails_the_start(
    model_dir, adapters, tmp_path, fault
):
    settings = (adapters["first"] / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(settings)
    if fault == "other_shapes":
        weights = load_file(adapters["first"] / "adapter_model.safetensors")
        wider = {name: each.repeat(2, 2) for name, each in weights.items()}
        save_file(wider, tmp_path / "adapter_model.safetensors")
    paths = {"fine": str(adapters["first"]), "doctor": str(tmp_path)}
    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192, adapters=paths)
    config = EngineConfig(block_size=BLOCK_SIZE, kv_cache_memory_bytes=16 << 20, enforce_eager=True)
    kv = KvConfig(host="127.0.0.1", carrier="grpc")
    engine = Engine(engine_args(model, config, kv, Role.DECODE), adapters=paths)
    with pytest.raises(EngineStartFailed, match=r"model\.adapters\.doctor: \S"):
        await DecodeService(engine).start()
    assert not engine.is_dead  # it is closed
