"""One engine at sparse positions against transformers, on every runner, kernel and graph mode."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .findings import Sheet
from .machine import MAX_TOKENS, ProofMachine, links, main_model
from .models import MODELS, model_folder
from .prompts import PromptCase, jobs, sampling

if TYPE_CHECKING:
    from specprefill.engine.engine import Engine

    from .reference import GreedyAnswer

OUTPUT_TOKENS = 24
TOP = 5  # log-probabilities per output token
CACHED = ("gaps", "last_tokens_dropped", "chunked_prefill", "chunked_whole", "long_gaps")
_CAPTURE = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]
_FULL = {"mode": 0, "cudagraph_mode": "FULL", "cudagraph_capture_sizes": _CAPTURE}


@dataclass(frozen=True, slots=True)
class EngineVariant:
    """One way to run an engine."""

    v2: bool  # vLLM's model runner
    backend: str | None  # of attention; None: vLLM's choice
    graphs: str  # eager, full (no compilation), default (vLLM's for the role)
    role: str
    dtype: str
    model: str = "tiny"
    interpreted: bool = False  # Triton's kernels, on a CPU


VARIANTS = {
    "v2-flash-eager": EngineVariant(True, "FLASH_ATTN", "eager", "PREFILL", "bfloat16", "wide"),
    "v2-triton-eager-fp32": EngineVariant(True, "TRITON_ATTN", "eager", "PREFILL", "float32"),
    "v2-flash-fullgraph": EngineVariant(True, "FLASH_ATTN", "full", "DECODE", "bfloat16", "wide"),
    "v2-triton-fullgraph": EngineVariant(True, "TRITON_ATTN", "full", "DECODE", "bfloat16"),
    "v2-flash-default-prefill": EngineVariant(
        True, "FLASH_ATTN", "default", "PREFILL", "bfloat16", "wide"
    ),
    "v2-flash-default-decode": EngineVariant(
        True, "FLASH_ATTN", "default", "DECODE", "bfloat16", "wide"
    ),
    "v1-triton-eager-fp32": EngineVariant(False, "TRITON_ATTN", "eager", "PREFILL", "float32"),
    "v1-flash-fullgraph": EngineVariant(False, "FLASH_ATTN", "full", "DECODE", "bfloat16", "wide"),
    "v1-flash-default-prefill": EngineVariant(
        False, "FLASH_ATTN", "default", "PREFILL", "bfloat16", "wide"
    ),
    "cpu-v1": EngineVariant(False, None, "eager", "PREFILL", "float32"),
    "cpu-v2": EngineVariant(True, None, "eager", "PREFILL", "float32", interpreted=True),
}


@dataclass(frozen=True, slots=True)
class _Answers:
    alone: list[GreedyAnswer]
    mixed: list[GreedyAnswer]
    cached: list[GreedyAnswer]
    cached_tokens: int  # the least that one of `cached` found


def prove(sheet: Sheet, machine: ProofMachine, name: str) -> None:
    """Run each case alone, then all twice in one batch, then again from the prefix cache."""
    from .reference import Reference, check_that_it_can_fail, compare

    variant = VARIANTS[name]
    folder = model_folder(variant.model, variant.dtype, MAX_TOKENS, weights=True)
    answers = asyncio.run(_answers(sheet, machine, variant, folder))
    reference = Reference(folder, machine.device)
    for what in ("alone", "mixed", "cached"):
        some = getattr(answers, what)
        compare(sheet, f"{what} equals transformers", reference, some, variant.dtype)
    sheet.check("the prefix cache is hit", answers.cached_tokens > 0, least=answers.cached_tokens)
    gaps = next(one for one in answers.alone if one.job.name.startswith("gaps"))
    check_that_it_can_fail(sheet, reference, gaps, variant.dtype)


async def _answers(
    sheet: Sheet, machine: ProofMachine, variant: EngineVariant, folder: str
) -> _Answers:
    vocabulary = MODELS[variant.model].vocabulary
    started_s = time.monotonic()
    async with _engine(sheet, machine, variant, folder) as engine:
        sheet.measure("engine started", start_s=time.monotonic() - started_s)
        some = jobs(0, vocabulary)
        alone = [(await _answer(engine, job, "alone"))[0] for job in some]
        batch = jobs(1, vocabulary) + jobs(2, vocabulary)
        mixed = await asyncio.gather(*(_answer(engine, job, "mixed") for job in batch))
        again = [job for job in some if job.name.rpartition("-")[0] in CACHED]
        cached = [await _answer(engine, job, "again") for job in again]
    return _Answers(
        alone,
        [answered for answered, _ in mixed],
        [answered for answered, _ in cached],
        min(tokens for _, tokens in cached),
    )


def _engine(sheet: Sheet, machine: ProofMachine, variant: EngineVariant, folder: str) -> Engine:
    from specprefill.engine.args import Role, engine_args, vllm_config
    from specprefill.engine.engine import Engine

    graphs: dict[str, Any] = {"compilation_config": _FULL} if variant.graphs == "full" else {}
    sizes = machine.small_engine(
        eager=variant.graphs == "eager",
        backend=variant.backend,
        skip_tokenizer_init=True,
        **graphs,
    )
    model = main_model(folder, variant.dtype, MAX_TOKENS, weights=True)
    args = engine_args(model, sizes, links(), Role[variant.role])
    chosen = vllm_config(args)
    sheet.check(
        "model runner",
        bool(chosen.use_v2_model_runner) is variant.v2,
        v2=bool(chosen.use_v2_model_runner),
        backend=str(chosen.attention_config.backend),
        graphs=str(chosen.compilation_config.cudagraph_mode),
        compiled=str(chosen.compilation_config.mode),
    )
    return Engine(args)


async def _answer(engine: Engine, job: PromptCase, kind: str) -> tuple[GreedyAnswer, int]:
    """Return the engine's answer to the kept tokens, and how many its prefix cache had."""
    from specprefill.engine.params import POSITIONS

    from .reference import GreedyAnswer

    params = sampling(max_tokens=OUTPUT_TOKENS, logprobs=TOP, detokenize=False)
    if not job.positions.is_identity:
        params.extra_args = {POSITIONS: job.positions.to_wire()}
    last: Any = None
    kept = job.selection.engine_prompt(job.prompt)
    async for output in engine.generate(kept, params, f"{kind}-{job.name}"):
        last = output
    completion = last.outputs[0]
    logprobs = [{token: one.logprob for token, one in step.items()} for step in completion.logprobs]
    return GreedyAnswer(job, list(completion.token_ids), logprobs), last.num_cached_tokens or 0
