"""Time to first token, the hand-over's rate, and the gap to the second token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from specprefill.config import AppConfig
from specprefill.core.pipeline import Pipeline
from specprefill.core.types import Plan, PlanKind, Reason, Request, keep_all

from .. import gap
from .findings import Sheet
from .machine import ProofMachine, device_to_itself, links, main_model
from .models import MODELS, kv_bytes_per_token, model_folder
from .prompts import prompt, wire

_DENSE = Plan(PlanKind.DENSE, Reason.ASKED_OFF)
KEEPS = {"0.5": 0.5, "0.3": 0.3, "0.1": 0.1}
PLANS = {"dense": _DENSE} | {
    name: Plan(PlanKind.PRUNE, Reason.ASKED, keep) for name, keep in KEEPS.items()
}
STAGES = ("queue_s", "speculate_s", "prefill_s", "transfer_s", "first_decode_s")
BEFORE_FIRST = STAGES[:3]  # what the first token waits for
GROWTH = 1.5  # a round takes its tokens to this power: linear hand-overs, quadratic attention


@dataclass(frozen=True, slots=True)
class LatencySizes:
    """Sizes of the models and prompts."""

    main: str
    draft: str
    chunk_tokens: int
    lengths: tuple[int, ...]
    rounds: tuple[int, ...]  # per length, after one that warms up the first

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt and its answer."""
        return self.lengths[-1] + 1024


GPU = LatencySizes("8b", "1b", 8192, (8192, 32768, 65536), (3, 2, 1))
CPU = LatencySizes("cpu-main", "cpu-draft", 1024, (1024, 2048), (1, 1))
SHORT = LatencySizes("cpu-main", "cpu-draft", 1024, (1024,), (1,))


@dataclass(slots=True)
class Round:
    """Times of one length's prompts, by plan, in the order they were run."""

    one_engine_s: list[float] = field(default_factory=list)  # dense, nothing handed over
    plans: dict[str, list[gap.GapRun]] = field(default_factory=dict)
    late: list[gap.GapRun] = field(default_factory=list)  # dense, pulled after the first token


@dataclass(frozen=True, slots=True)
class Bench:
    """The pipeline that is measured."""

    pipeline: Pipeline
    machine: ProofMachine
    sizes: LatencySizes

    async def run(self, length: int, seed: int, into: Round) -> None:
        """Run every plan once, each with a prompt of its own."""
        into.one_engine_s.append(await self._one_engine(length, seed))
        for name, plan in PLANS.items():
            request = self._request(f"{name}-{seed}", length, plan)
            into.plans.setdefault(name, []).append(
                await gap.answer(self.pipeline, "early", request)
            )
        late = replace(self.pipeline, overlap=False)
        request = self._request(f"late-{seed}", length, _DENSE)
        into.late.append(await gap.answer(late, "late", request))

    async def _one_engine(self, length: int, seed: int) -> float:
        """Return seconds to the only token asked for: the engine holds nothing for a peer."""
        request = self._request(f"one-{seed}", length, _DENSE, output_tokens=1)
        started_s = time.monotonic()
        prefill = self.pipeline.prefiller.prefill(request, keep_all(length, _DENSE), 120.0)
        async with prefill as prefilling:
            await prefilling.result()
            return time.monotonic() - started_s

    def _request(
        self, name: str, length: int, plan: Plan, output_tokens: int = gap.OUTPUT_TOKENS
    ) -> Request:
        vocabulary = MODELS[self.sizes.main].vocabulary
        request_id = f"{length}-{name}"
        tokens = prompt(length, request_id, vocabulary)
        return Request(request_id, tokens, wire(max_tokens=output_tokens), plan=plan)


def prove(sheet: Sheet, machine: ProofMachine, name: str | None, out: Path, limit_s: float) -> None:
    """Start the three services once; then every length, dense and pruned in turns."""
    stop_s = time.monotonic() + limit_s
    sizes = GPU if not machine.cpu else SHORT if name == "short" else CPU
    asyncio.run(_measure(sheet, machine, sizes, out, lambda: stop_s - time.monotonic()))


async def _measure(
    sheet: Sheet, machine: ProofMachine, sizes: LatencySizes, out: Path, left_s: Callable[[], float]
) -> None:
    from ..pools import local_pipeline

    started_s = time.monotonic()
    async with local_pipeline(configuration(machine, sizes)) as planned:
        sheet.measure("three services started", start_s=time.monotonic() - started_s)
        bench = Bench(planned.pipeline, machine, sizes)
        with device_to_itself(out):
            await bench.run(sizes.lengths[0], -1, Round())
            await _every_length(sheet, bench, left_s)


async def _every_length(sheet: Sheet, bench: Bench, left_s: Callable[[], float]) -> None:
    """Yield rounds as long as there is time; the first of a length is known to fit, or left out."""
    took_s, before = 0.0, bench.sizes.lengths[0]
    for length, rounds in zip(bench.sizes.lengths, bench.sizes.rounds, strict=True):
        if left_s() < took_s * (length / before) ** GROWTH:
            sheet.check(f"{length} tokens: left out, no time", ok=False, left_s=left_s())
            continue
        found = Round()
        for turn in range(rounds):
            if turn > 0 and left_s() < took_s * 1.5:
                break
            started_s = time.monotonic()
            await bench.run(length, turn, found)
            took_s = time.monotonic() - started_s
        report(sheet, bench, length, found)
        before = length


def report(sheet: Sheet, bench: Bench, length: int, found: Round) -> None:
    """Write a row per plan, and one for the hand-over."""
    one_engine_s = median(found.one_engine_s)
    dense_s = _median_of(found.plans["dense"], lambda run: run.token_s[0])
    for name, runs in found.plans.items():
        sheet.measure(f"{length} tokens, {name}", **_row(runs, length, one_engine_s, dense_s))
    size = length * kv_bytes_per_token(bench.sizes.main, bench.machine.dtype)
    transfer_s = _median_of(found.late, lambda run: run.report.transfer_s)
    sheet.measure(
        f"{length} tokens, pulled late",
        gigabytes=size / 1e9,
        transfer_s=transfer_s,
        gb_per_s=size / 1e9 / transfer_s if transfer_s else None,
        gap_s=_median_of(found.late, lambda run: run.gap_s),
        early_gap_s=_median_of(found.plans["dense"], lambda run: run.gap_s),
        itl_s=_median_of(found.late, lambda run: run.itl_s),
    )
    everything = [run for runs in (*found.plans.values(), found.late) for run in runs]
    recomputed = sum(run.report.recomputed for run in everything)
    sheet.check(
        f"{length} tokens: every prompt is handed over",
        recomputed == 0,
        recomputed=recomputed,
        of=len(everything),
    )


def _row(
    runs: Sequence[gap.GapRun], length: int, one_engine_s: float, dense_s: float
) -> dict[str, Any]:
    """Return medians. `overhead_s` is the part of the first token's time outside every stage."""
    stages = {name: median(getattr(run.report, name) for run in runs) for name in STAGES}
    first_s = _median_of(runs, lambda run: run.token_s[0])
    kept = runs[0].report.kept_tokens
    return {
        "kept_tokens": kept,
        "runs": len(runs),
        "first_token_s": first_s,
        "one_engine_s": one_engine_s,
        "speed_up": dense_s / first_s,
        "over_one_engine": one_engine_s / first_s,
        "ceiling": 1.0 / (kept / length + stages["speculate_s"] / one_engine_s),
        "overhead_s": first_s - sum(stages[name] for name in BEFORE_FIRST),
        "gap_s": _median_of(runs, lambda run: run.gap_s),
        **stages,
    }


def _median_of(runs: Sequence[gap.GapRun], value: Callable[[gap.GapRun], float]) -> float:
    return median(value(run) for run in runs)


def configuration(machine: ProofMachine, sizes: LatencySizes) -> AppConfig:
    """Configure three services on one device, with nothing cached between runs.

    Eager is fair to long prefills, which run without graphs anyway, and starts sooner.
    """
    dtype, most = machine.dtype, sizes.max_tokens
    engine = machine.engine(
        {
            "kv_cache_memory_bytes": kv_bytes_per_token(sizes.main, dtype) * (most + 1024),
            "max_num_batched_tokens": sizes.chunk_tokens,
            "max_num_seqs": 8,
            "enforce_eager": True,
            "enable_prefix_caching": False,
        },
        share=0.25,
        backend=None if machine.cpu else "FLASH_ATTN",
    )
    return AppConfig.model_validate(
        {
            "model": main_model(
                model_folder(sizes.main, dtype, most, weights=False), dtype, most, weights=False
            ),
            "speculator": {
                "path": model_folder(sizes.draft, dtype, most, weights=False),
                "dtype": dtype,
                "device": machine.device,
                "random_weights": True,
                "prefill_chunk_tokens": sizes.chunk_tokens,
                "kv_memory_bytes": (512 << 20) if machine.cpu else (4 << 30),
                "score_cache_bytes": 0,
                "timeout_s": 60.0,
            },
            "selection": {"min_prompt_tokens": 256, "min_kept_tokens": 64, "min_gain": None},
            "prefill": engine,
            "decode": engine,
            "kv": links(
                max_held_bytes=(1 << 30) if machine.cpu else (20 << 30),
                pull_timeout_s=60.0,
                lease_s=60.0,
                streams=2,
            ),
        }
    )
