"""The pipeline with one real engine per pool, all in this process's care and without Ray."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager
from dataclasses import dataclass

from specprefill.config import AppConfig
from specprefill.control.from_config import (
    decode_caches,
    fallback,
    kv_block_tokens,
    local_prefill,
    net_gain,
    patience,
    planner,
)
from specprefill.control.gain import NetGain
from specprefill.core import heap
from specprefill.core.fakes import PlannedPipeline
from specprefill.core.pipeline import Pipeline
from specprefill.core.ports import Prefilling
from specprefill.core.types import Request, Selection
from specprefill.decode.service import DecodeService
from specprefill.engine.args import Role, engine_args
from specprefill.engine.engine import Engine
from specprefill.kv.holding import RemoteLeases
from specprefill.kv.prefilling import hold_prefill
from specprefill.kv.rpc import KvPeers
from specprefill.prefill.service import PrefillService
from specprefill.speculator.service import SpeculatorService
from specprefill.speculator.words_service import WordsService

from .cpu_environment import CPU_ENVIRONMENT


@dataclass(frozen=True, slots=True)
class LocalPrefiller:
    """The `Prefiller` port over a service in this process."""

    service: PrefillService
    leases: RemoteLeases

    @asynccontextmanager
    async def prefill(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncIterator[Prefilling]:
        """See `ports.Prefiller`."""
        async with (
            aclosing(self.service.steps(request, selection, timeout_s)) as steps,
            hold_prefill(steps, self.leases) as one,
        ):
            yield one


@asynccontextmanager
async def local_pipeline(
    config: AppConfig, gain: NetGain | None = None
) -> AsyncIterator[PlannedPipeline[Pipeline]]:
    """Start the three services, and stop them at the end. `gain` decides what pays."""
    held = decode_caches(config)
    gain = net_gain(config, decode_caches=held) if gain is None else gain
    async with AsyncExitStack() as stack:
        peers = KvPeers()
        stack.push_async_callback(peers.close)
        by_model = config.speculator.reads_with_model
        speculator = (SpeculatorService if by_model else WordsService).from_config(
            config.speculator,
            config.selection,
            config.model.path,
            kv_block_tokens(config.prefill),
        )
        stack.push_async_callback(speculator.close)
        await speculator.start()
        prefill_args = engine_args(config.model, config.prefill, config.kv, Role.PREFILL)
        prefill = await stack.enter_async_context(
            PrefillService(Engine(prefill_args), max_held_bytes=config.kv.max_held_bytes)
        )
        decode_args = engine_args(config.model, config.decode, config.kv, Role.DECODE)
        decode = await stack.enter_async_context(DecodeService(Engine(decode_args)))
        heap.freeze()
        stack.callback(heap.thaw)
        pipeline = Pipeline(
            speculator,
            LocalPrefiller(prefill, peers),
            decode,
            patience(config.speculator),
            fallback(config),
            overlap=config.kv.overlap,
            local=local_prefill(config.kv, gain.models, held),
            recompute_below=config.selection.recompute_below,
        )
        yield PlannedPipeline(pipeline, planner(config.selection, gain))


def set_cpu_environment() -> None:
    """Set the environment before vLLM is imported: CPU engines share the cores, a thread each."""
    os.environ.update(CPU_ENVIRONMENT)
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)  # it would override kv_cache_memory_bytes
