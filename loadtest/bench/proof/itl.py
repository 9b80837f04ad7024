"""Inter-token latency of our decode service beside a plain vLLM engine's."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from specprefill.config import EngineConfig

from .findings import Sheet
from .jobs import PLAIN
from .machine import ProofMachine, device_to_itself, links, main_model
from .models import MODELS, kv_bytes_per_token, model_folder
from .prompts import PromptCase, every_other, prompt, sampling

if TYPE_CHECKING:
    from specprefill.decode.service import DecodeService
    from specprefill.engine.engine import Engine

RUN = 32  # tokens kept and dropped in turn
MAX_TOKENS = 2048
ROUNDS = 3


@dataclass(frozen=True, slots=True)
class ItlSizes:
    """Sizes of the model, and of the batches."""

    model: str
    batches: tuple[int, ...]
    kept_tokens: int
    output_tokens: int


GPU = ItlSizes("1b", (1, 32, 128), 512, 256)
CPU = ItlSizes("cpu-main", (1, 4), 128, 24)


@dataclass(frozen=True, slots=True)
class OurEngine:
    """The decode service at sparse positions; every request replays its first token."""

    service: DecodeService

    async def stream(self, job: PromptCase, output_tokens: int) -> AsyncGenerator[int]:
        """Yield the number of tokens, each time some come."""
        request = job.request(max_tokens=output_tokens)
        first = ((job.prompt[0],),)
        async for step in self.service.decode(request, job.selection, None, first, 120.0):
            yield len(step.chunk.token_ids)


@dataclass(frozen=True, slots=True)
class PlainEngine:
    """vLLM without anything of ours, on as many tokens."""

    engine: Engine

    async def stream(self, job: PromptCase, output_tokens: int) -> AsyncGenerator[int]:
        """Yield the number of tokens, each time some come."""
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        params = sampling(max_tokens=output_tokens, output_kind=kind)
        kept = job.selection.engine_prompt(job.prompt)
        async for output in self.engine.generate(kept, params, job.name):
            yield len(output.outputs[0].token_ids)


def prove(sheet: Sheet, machine: ProofMachine, name: str, out: Path) -> None:
    """Measure `ours` or `plain`; the program sets one beside the other."""
    asyncio.run(_measure(sheet, machine, name, out))


async def _measure(sheet: Sheet, machine: ProofMachine, name: str, out: Path) -> None:
    from specprefill.decode.service import DecodeService
    from specprefill.engine.args import Role, engine_args
    from specprefill.engine.engine import Engine

    sizes = CPU if machine.cpu else GPU
    folder = model_folder(sizes.model, machine.dtype, MAX_TOKENS, weights=False)
    model = main_model(folder, machine.dtype, MAX_TOKENS, weights=False)
    args = engine_args(model, _engine(machine, sizes), links(), Role.DECODE)
    if name == PLAIN:
        args = dataclasses.replace(
            args, kv_transfer_config=None, worker_cls="auto", logits_processors=None
        )
    started_s = time.monotonic()
    async with Engine(args) as engine:
        sheet.measure("engine started", start_s=time.monotonic() - started_s)
        answering = PlainEngine(engine) if name == PLAIN else OurEngine(DecodeService(engine))
        with device_to_itself(out):
            await _batch(answering, sizes, sizes.batches[-1], "warm-up")
            for batch in sizes.batches:
                rounds = [
                    await _batch(answering, sizes, batch, f"{turn}") for turn in range(ROUNDS)
                ]
                itl_s = median(steady_itl_s(times) for times in rounds)
                sheet.measure(f"batch {batch}", batch=batch, rounds=ROUNDS, itl_ms=itl_s * 1e3)


def _engine(machine: ProofMachine, sizes: ItlSizes) -> EngineConfig:
    most = max(sizes.batches)
    tokens = max(MAX_TOKENS, most * (sizes.kept_tokens + sizes.output_tokens)) + 64 * most
    return machine.engine(
        {
            "kv_cache_memory_bytes": kv_bytes_per_token(sizes.model, machine.dtype) * tokens,
            "max_num_seqs": most,
            "enforce_eager": machine.cpu,
            "enable_prefix_caching": False,
        },
        share=0.1,
        backend=None if machine.cpu else "FLASH_ATTN",
    )


async def _batch(
    answering: OurEngine | PlainEngine, sizes: ItlSizes, batch: int, seed: str
) -> list[list[float]]:
    """Return when each token came, per request; all are sent at once."""
    length = 2 * sizes.kept_tokens
    selection = every_other(length, RUN)
    vocabulary = MODELS[sizes.model].vocabulary
    names = [f"{batch}-{row}-{seed}" for row in range(batch)]
    some = [PromptCase(name, prompt(length, name, vocabulary), selection) for name in names]
    return await asyncio.gather(*(_times(answering, job, sizes.output_tokens) for job in some))


async def _times(
    answering: OurEngine | PlainEngine, job: PromptCase, output_tokens: int
) -> list[float]:
    times: list[float] = []
    async for count in answering.stream(job, output_tokens):
        times += [time.perf_counter()] * count
    if len(times) != output_tokens:
        raise RuntimeError(f"{job.name}: {len(times)} tokens came, not {output_tokens}")
    return times


def steady_itl_s(times: Sequence[Sequence[float]]) -> float:
    """Return seconds a token while every request decodes: the median of the requests' means.

    Raises ValueError when there is no such time.
    """
    start_s, end_s = max(one[0] for one in times), min(one[-1] for one in times)
    steady = [[at_s for at_s in one if start_s <= at_s <= end_s] for one in times]
    if any(len(one) < 2 for one in steady):
        raise ValueError("the requests of the batch never decoded all at once")
    return median((one[-1] - one[0]) / (len(one) - 1) for one in steady)
