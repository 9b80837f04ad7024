"""A prefill and a decode engine on one device against one engine, and against transformers."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from specprefill.config import AppConfig
from specprefill.core.pipeline import Pipeline
from specprefill.core.types import Chunk, Plan, Request, Selection, Ticket

from ..pools import LocalPrefiller, local_pipeline
from .findings import Sheet
from .machine import MAX_TOKENS, ProofMachine, links, main_model
from .models import MODELS, model_folder
from .parity import OUTPUT_TOKENS, TOP
from .prompts import CASES, PromptCase, jobs
from .reference import GreedyAnswer, Reference, compare

AT_ONCE = 32
DRAIN_S = 5.0
_NOBODY = ("127.0.0.1:9",)


@dataclass(frozen=True, slots=True)
class FixedSelections:
    """The port `Speculator` with selections that were made before."""

    selections: dict[str, Selection]  # by request

    async def select(self, request: Request, plan: Plan, timeout_s: float) -> Selection:
        """See the port."""
        del plan, timeout_s
        return self.selections[request.request_id]


@dataclass(frozen=True, slots=True)
class _Row:
    """One job's answer by two engines and by one."""

    handed_over: GreedyAnswer
    recomputed: bool
    aggregated: list[int]

    @property
    def equal(self) -> bool:
        return self.handed_over.tokens == self.aggregated


def prove(sheet: Sheet, machine: ProofMachine, name: str) -> None:
    """Run each case alone, then 32 at once; check a peer that is gone, and that nothing is held.

    `name` is the carrier; `grpc+graphs` with vLLM's graphs, without it the engines are eager.
    """
    carrier, _, graphs = name.partition("+")
    if carrier == "nixl" and importlib.util.find_spec("nixl") is None:
        sheet.skip("nixl is not importable here")
        return
    model = "tiny" if machine.cpu else "wide"
    folder = model_folder(model, machine.dtype, MAX_TOKENS, weights=True)
    config = _configuration(machine, folder, carrier, eager=machine.cpu or not graphs)
    rows = asyncio.run(_rows(sheet, config, MODELS[model].vocabulary))
    _judge(sheet, machine, rows, Reference(folder, machine.device))


def _configuration(machine: ProofMachine, folder: str, carrier: str, *, eager: bool) -> AppConfig:
    # The decode engine also answers alone, and must not find the pulled KV in its cache.
    engine = machine.small_engine(eager=eager, backend=None if machine.cpu else "FLASH_ATTN")
    draft = model_folder("cpu-draft", machine.dtype, MAX_TOKENS, weights=False)
    return AppConfig.model_validate(
        {
            "model": main_model(folder, machine.dtype, MAX_TOKENS, weights=True),
            "speculator": {
                "path": draft,
                "dtype": machine.dtype,
                "device": machine.device,
                "random_weights": True,
                "kv_memory_bytes": 64 << 20,
            },
            "prefill": engine,
            "decode": engine.model_copy(update={"enable_prefix_caching": False}),
            "kv": links(carrier=carrier, max_held_bytes=1 << 30),
        }
    )


async def _rows(sheet: Sheet, config: AppConfig, vocabulary: int) -> list[_Row]:
    started_s = time.monotonic()
    async with local_pipeline(config) as planned:
        pipeline = planned.pipeline  # every request carries its plan
        service = _prefiller(pipeline).service
        sheet.measure("started", start_s=time.monotonic() - started_s, carrier=service.carrier)
        some = jobs(10, vocabulary)
        alone = [await _handed_over(pipeline, job) for job in some]
        many = [job for seed in range(20, 20 + AT_ONCE // len(CASES))
                for job in jobs(seed, vocabulary)]  # fmt: skip
        together = await asyncio.gather(*(_handed_over(pipeline, job) for job in many))
        sheet.check("32 at once are answered", len(together) == AT_ONCE, answers=len(together))
        await _lose_the_peer(sheet, pipeline, vocabulary)
        rows = [
            _Row(answered, recomputed, await _ask_aggregated(pipeline, answered.job))
            for answered, recomputed in [*alone, *together]
        ]
        drained, gauges = await service.drain(DRAIN_S), await service.gauges()
        held = sum(one.bytes_held for one in gauges)
        sheet.check("nothing is held at the end", drained and held == 0, bytes_held=held)
        return rows


def _prefiller(pipeline: Pipeline) -> LocalPrefiller:
    if not isinstance(pipeline.prefiller, LocalPrefiller):
        raise TypeError(f"not a local pipeline: {pipeline.prefiller}")
    return pipeline.prefiller


async def _handed_over(pipeline: Pipeline, job: PromptCase) -> tuple[GreedyAnswer, bool]:
    """Return the pipeline's answer, and whether the decode engine had to compute the prompt."""
    chosen = replace(pipeline, speculator=FixedSelections({job.name: job.selection}))
    request = replace(job.request(max_tokens=OUTPUT_TOKENS, logprobs=TOP), plan=job.selection.plan)
    async with aclosing(chosen.generate(request)) as stream:
        chunks = [chunk async for chunk in stream]
    report = chunks[-1].report
    return _greedy_answer(job, chunks), report is None or report.recomputed


async def _ask_aggregated(pipeline: Pipeline, job: PromptCase) -> list[int]:
    """Return the tokens of the decode engine alone."""
    steps = pipeline.decoder.decode(
        job.request(max_tokens=OUTPUT_TOKENS), job.selection, None, ((),), 60.0
    )
    return [token async for step in steps for token in step.chunk.token_ids]


async def _lose_the_peer(sheet: Sheet, pipeline: Pipeline, vocabulary: int) -> None:
    """Check that a ticket whose prefill engine is gone costs time, not tokens."""
    (job,) = jobs(30, vocabulary, ("gaps",))
    request = job.request(max_tokens=OUTPUT_TOKENS)
    async with _hold_first(pipeline, job, request) as (ticket, first):
        gone = replace(ticket, endpoints=_NOBODY)
        steps = [
            step
            async for step in pipeline.decoder.decode(request, job.selection, gone, (first,), 60.0)
        ]
    tokens = [token for step in steps for token in step.chunk.token_ids]
    right = tokens == await _ask_aggregated(pipeline, job) and steps[-1].recomputed
    sheet.check("a lost peer is recomputed", right, recomputed=steps[-1].recomputed)


@asynccontextmanager
async def _hold_first(
    pipeline: Pipeline, job: PromptCase, request: Request
) -> AsyncIterator[tuple[Ticket, tuple[int, ...]]]:
    async with pipeline.prefiller.prefill(request, job.selection, 60.0) as prefilling:
        prefilled = await prefilling.result()
        if prefilled.ticket is None:
            raise RuntimeError(f"{job.name}: no ticket came with the first token")
        yield prefilled.ticket, prefilled.first.token_ids


def _greedy_answer(job: PromptCase, chunks: Sequence[Chunk]) -> GreedyAnswer:
    tokens = [token for chunk in chunks for token in chunk.token_ids]
    logprobs = [
        {one.token_id: one.logprob for one in candidates}
        for chunk in chunks
        for candidates in chunk.logprobs or ()
    ]
    return GreedyAnswer(job, tokens, logprobs)


def _judge(sheet: Sheet, machine: ProofMachine, rows: Sequence[_Row], reference: Reference) -> None:
    equal, recomputed = _count(rows, lambda row: row.equal), _count(rows, lambda r: r.recomputed)
    sheet.check("every prompt is handed over", recomputed == 0, recomputed=recomputed)
    counts = {"equal": f"{equal}/{len(rows)}"}
    if machine.dtype == "float32":
        sheet.check("handed over equals one engine", equal == len(rows), **counts)
    else:  # a near tie may fall the other way in another batch: transformers decides
        sheet.measure("handed over equals one engine", **counts)
    answers = [row.handed_over for row in rows]
    compare(sheet, "handed over equals transformers", reference, answers, machine.dtype)


def _count(rows: Sequence[_Row], predicate: Callable[[_Row], bool]) -> int:
    return sum(predicate(row) for row in rows)
