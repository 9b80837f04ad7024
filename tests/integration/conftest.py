"""Real vLLM engines on a tiny random model: started once, shared by every test."""

from __future__ import annotations

import enum
import os
import random
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

os.environ.update(
    SPECPREFILL_CPU_ENGINE="1",
    OMP_NUM_THREADS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="ERROR",
)
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)

from specprefill.config import EngineConfig, KvConfig, MainModel
from specprefill.core.positions import PositionMap
from specprefill.core.types import Plan, PlanKind, PrefillResult, Reason, Request, Selection, Span
from specprefill.kv.rpc import KvPeers
from specprefill.kv.tls import read_tls

from ..certificates import Authority

BLOCK_SIZE = 32
MODELS = Path(__file__).resolve().parents[2] / "models"
INTERPRETER = Path(__file__).resolve().parent / "interpreter"


class Runner(enum.StrEnum):
    """vLLM's model runners. V2, the default on GPUs, runs here under Triton's interpreter."""

    V1 = "v1"
    V2 = "v2"


# Both runners, where other modules show the same of the V2 runner in less time: every step of it
# takes tens of milliseconds in Triton's interpreter.
V2_THOROUGHLY = (Runner.V1, pytest.param(Runner.V2, marks=pytest.mark.thorough))


def pytest_generate_tests(metafunc):
    """Tests that use `engines` run on the runners that their module names in RUNNERS."""
    if "engines" in metafunc.fixturenames:
        runners = getattr(metafunc.module, "RUNNERS", (Runner.V1,))
        metafunc.parametrize("engines", runners, indirect=True, scope="package")


@contextmanager
def starting(runner: Runner) -> Iterator[None]:
    """Engine processes started inside run `runner`.

    A running engine keeps its runner: only its start looks at the environment.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_USE_V2_MODEL_RUNNER", str(int(runner is Runner.V2)))
        if runner is Runner.V2:
            patch.setenv("TRITON_INTERPRET", "1")
            patch.setenv("PYTHONPATH", str(INTERPRETER), prepend=os.pathsep)
            patch.setattr("vllm.config.vllm.HAS_TRITON", True)  # in the engine's process it is
        yield


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> str:
    """A random Llama whose output depends on every position: untied head, wide init."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(tmp_path_factory.mktemp("tiny-llama"))
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "demo-main")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_theta=10000.0,
        tie_word_embeddings=False,
        initializer_range=0.08,
        eos_token_id=tokenizer.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@dataclass
class Engines:
    """A prefill and a decode engine that hand KV over, and a plain vLLM one beside them."""

    runner: Runner
    prefill: object
    decode: object
    plain: object
    prefill_engine: object  # the engine inside `prefill`, to use it as an aggregated one
    peers: KvPeers  # as a gateway talks to the prefill engine's KV port
    count: int = field(default=0)

    @property
    def answer_tokens(self) -> int:
        """The length of answers; an interpreted step takes tens of milliseconds."""
        return 12 if self.runner is Runner.V2 else 24

    def request(self, prompt, **sampling) -> Request:
        """A request for `prompt` with vLLM sampling parameters."""
        from vllm import SamplingParams

        self.count += 1
        samples = sampling.pop("samples", 1)
        given = {"temperature": 0.0, "max_tokens": self.answer_tokens, **sampling}
        params = SamplingParams(**given)
        wire = msgspec.msgpack.encode(params)
        return Request(f"r{self.count}", tuple(prompt), wire, samples=samples, timeout_s=60.0)

    async def handed_over(self, request, selection):
        """The decode engine's answer after a prefill elsewhere: chunks per sample."""
        prefilled = await self.prefill.prefill(request, selection, 60.0)
        return prefilled, await self.decoded(request, selection, prefilled)

    async def decoded(self, request, selection, prefilled: PrefillResult, replay=None):
        """Every step of the decode engine, which replays the first token if nothing else.

        The lease is released at the end, as the pipeline does.
        """
        first = (prefilled.first.token_ids, *((),) * (request.samples - 1))
        steps = self.decode.decode(request, selection, prefilled.ticket, replay or first, 60.0)
        try:
            return [step async for step in steps]
        finally:
            if prefilled.ticket is not None:
                await self.peers.release(prefilled.ticket)

    async def aggregated(self, request, selection):
        """The same request on one engine, prefill and decode together."""
        return await self._whole(self.prefill_engine, request, selection)

    async def plain_vllm(self, request):
        """The same request on an engine without anything of ours."""
        selection = kept(len(request.prompt), Span(0, len(request.prompt)))
        return await self._whole(self.plain, request, selection)

    async def _whole(self, engine, request, selection):
        from specprefill.engine.outputs import sampling_params
        from specprefill.engine.params import POSITIONS

        params = sampling_params(request.sampling)
        mapping = PositionMap.from_runs(selection.runs, selection.prompt_tokens)
        if not mapping.is_identity:
            params.extra_args = {POSITIONS: mapping.to_wire()}
        self.count += 1
        last = None
        prompt = selection.engine_prompt(request.prompt)
        async for output in engine.generate(prompt, params, f"whole-{self.count}"):
            last = output
        return last.outputs[0]


def kept(prompt_tokens: int, *runs: Span) -> Selection:
    """A selection of these runs."""
    return Selection(prompt_tokens, runs, Plan(PlanKind.PRUNE, Reason.ASKED, 0.3))


def greedy_reference(model):
    """Greedy decoding by transformers at explicit positions."""
    import torch
    from transformers import DynamicCache

    def generate(prompt, selection, steps):
        positions = [p for run in selection.runs for p in range(run.start, run.stop)]
        ids, tokens, cache = [prompt[p] for p in positions], [], DynamicCache()
        with torch.inference_mode():
            for step in range(steps):
                logits = model(
                    input_ids=torch.tensor([ids]),
                    position_ids=torch.tensor([positions]),
                    past_key_values=cache,
                    use_cache=True,
                ).logits
                tokens.append(int(logits[0, -1].argmax()))
                ids, positions = tokens[-1:], [len(prompt) + step]
        return tokens

    return generate


def prompt_of(length: int, seed: int = 0) -> list[int]:
    """A prompt of random tokens."""
    rng = random.Random(seed)
    return [rng.randrange(10, 1000) for _ in range(length)]


def answer(steps, index: int = 0) -> list[int]:
    """One sample's tokens."""
    return [token for step in steps if step.chunk.index == index for token in step.chunk.token_ids]


def text(steps, index: int = 0) -> str:
    """One sample's text."""
    return "".join(step.chunk.text for step in steps if step.chunk.index == index)


@pytest.fixture(scope="package")
def kv_tls(tmp_path_factory):
    """Certificates for the KV ports of every engine that hands over to another."""
    return Authority(tmp_path_factory.mktemp("authority")).files()


@pytest_asyncio.fixture(scope="package", loop_scope="session")
async def engines(request, model_dir, kv_tls) -> AsyncIterator[Engines]:
    """The three engines on the runner `request.param`."""
    async with AsyncExitStack() as stack:
        with starting(request.param):
            started = running(request.param, model_dir, kv_tls)
            engines = await stack.enter_async_context(started)
        yield engines


@asynccontextmanager
async def running(runner: Runner, model_dir, files) -> AsyncIterator[Engines]:
    """A prefill, a decode and a plain engine, on the runner that the environment asks for."""
    from vllm.engine.arg_utils import AsyncEngineArgs

    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine
    from specprefill.prefill.service import PrefillService

    model = MainModel(path=model_dir, dtype="float32", max_model_len=8192)
    config = EngineConfig(
        block_size=BLOCK_SIZE,
        kv_cache_memory_bytes=64 << 20,
        enforce_eager=True,
        max_num_batched_tokens=512,  # prompts beyond it are prefilled in chunks
    )
    kv = KvConfig(host="127.0.0.1", pull_timeout_s=20.0, carrier="nixl", tls=files)
    tls = read_tls(files)
    producer = Engine(engine_args(model, config, kv, Role.PREFILL))
    consumer = Engine(engine_args(model, config, kv, Role.DECODE))
    plain = Engine(
        AsyncEngineArgs(
            model=model_dir,
            dtype="float32",
            max_model_len=8192,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=64 << 20,
            enforce_eager=True,
            distributed_executor_backend="uni",
        )
    )
    async with PrefillService(producer, tls) as prefill, DecodeService(consumer) as decode, plain:
        peers = KvPeers(tls)
        yield Engines(runner, prefill, decode, plain, producer, peers)
        await peers.close()
