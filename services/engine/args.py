"""Translates the deployment's configuration into vLLM's engine arguments."""

from __future__ import annotations

import enum
from copy import copy
from typing import Any

from vllm.config import KVTransferConfig, ModelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.reasoning import ReasoningParserManager
from vllm.usage.usage_lib import UsageContext

from ..config import (
    DecodeConfig,
    EngineConfig,
    KvConfig,
    MainModel,
    SpeculationConfig,
    local_path,
)
from .adapters import adapter_args

_MODULE = "specprefill.engine"
# Images are refused by request: a vision-language model's towers are neither loaded nor profiled.
_TEXT_ONLY = {"language_model_only": True}


class Role(enum.StrEnum):
    """The end of the KV hand-off that an engine is on."""

    PREFILL = "kv_producer"
    DECODE = "kv_consumer"


_POOLS = {Role.PREFILL: "prefill", Role.DECODE: "decode"}


def engine_args(
    model: MainModel,
    engine: EngineConfig,
    kv: KvConfig,
    role: Role,
    peer: EngineConfig | None = None,
    *,
    hands_over: bool = True,
) -> AsyncEngineArgs:
    """Return one engine's arguments. `peer` is the other end's, split as this one if absent.

    An engine that hands no KV over, because the model's cannot be, computes its prompts itself.
    """
    other = engine if peer is None else peer
    transfer = _transfer(model, kv, role, engine, other) if hands_over else None
    args = plain_args(
        model,
        engine,
        distributed_executor_backend=_executor(engine),
        kv_transfer_config=transfer,
        worker_cls=f"{_MODULE}.{_worker()}",
    )
    if args.served_model_name is None:  # the label `model_name` of the engine's metrics
        args.served_model_name = f"{model.served_name}/{_POOLS[role]}"
    v2 = _uses_v2(args)
    if isinstance(engine, DecodeConfig) and engine.speculation is not None:
        args.speculative_config = _speculation(engine.speculation, v2=v2)
    if v2 or args.speculative_config is None:  # else the runner adds it: vLLM refuses any
        args.logits_processors = [_replay(v2=v2), *(args.logits_processors or [])]
    return args


def is_ours(config: VllmConfig) -> bool:
    """Return True for an engine with a worker of ours: any other is a plain vLLM engine."""
    return str(config.parallel_config.worker_cls).startswith(_MODULE)


def plain_args(model: MainModel, engine: EngineConfig, **ours: Any) -> AsyncEngineArgs:
    """Return the deployment's own arguments: enough to look at the model, on any machine."""
    return AsyncEngineArgs(
        **_model_args(model),
        **_sizes(engine),
        tensor_parallel_size=engine.tensor_parallel_size,
        pipeline_parallel_size=engine.pipeline_parallel_size,
        enforce_eager=engine.enforce_eager,
        enable_prefix_caching=engine.enable_prefix_caching,
        **ours,
        **{**_TEXT_ONLY, **adapter_args(model.adapters), **engine.engine_args},
    )


def vllm_config(args: AsyncEngineArgs) -> VllmConfig:
    """Return vLLM's configuration, with the defaults of `vllm serve` for the device.

    Every other usage context has sizes that do not depend on the device. vLLM writes the sizes
    that it chooses into `args`, so whoever asks first decides.

    A window of every layer that no prompt outgrows is dropped: vLLM would page its KV in blocks
    of another size, for nothing.
    """
    if args.reasoning_parser_plugin:
        ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
    config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    if _has_idle_window(config.model_config):
        args.disable_sliding_window = True
        config = args.create_engine_config(UsageContext.OPENAI_API_SERVER)
    return config


def _has_idle_window(model: ModelConfig) -> bool:
    window = model.get_sliding_window()
    layers = getattr(model.hf_text_config, "layer_types", None) or ()
    everywhere = all(layer == "sliding_attention" for layer in layers)
    return window is not None and everywhere and window >= model.max_model_len


def _model_args(model: MainModel) -> dict[str, Any]:
    return {
        "model": local_path(model.path),
        "revision": model.revision,
        "dtype": model.dtype,
        "load_format": model.load_format,
        "max_model_len": model.max_model_len,
        "trust_remote_code": model.trust_remote_code,
    }


def _sizes(engine: EngineConfig) -> dict[str, Any]:
    """Return the sizes that are set; vLLM chooses the others."""
    sizes = {
        "block_size": engine.block_size,
        "kv_cache_memory_bytes": engine.kv_cache_memory_bytes,
        "max_num_seqs": engine.max_num_seqs,
        "max_num_batched_tokens": engine.max_num_batched_tokens,
    }
    return {name: size for name, size in sizes.items() if size is not None}


def _executor(engine: EngineConfig) -> str | None:
    if engine.executor != "auto":
        return engine.executor
    workers = engine.tensor_parallel_size * engine.pipeline_parallel_size
    return "uni" if workers == 1 and current_platform.is_cpu() else None


def _transfer(
    model: MainModel, kv: KvConfig, role: Role, engine: EngineConfig, peer: EngineConfig
) -> KVTransferConfig:
    hybrid = plain_args(model, engine).create_model_config().is_hybrid
    return KVTransferConfig(
        kv_connector="HybridConnector" if hybrid else "SpecPrefillConnector",
        kv_connector_module_path=f"{_MODULE}.handoff.connector",
        kv_role=role.value,
        kv_load_failure_policy=kv.on_failure,
        kv_connector_extra_config={
            "carrier": kv.carrier,
            "memory": kv.memory,
            "host": kv.host,
            "lease_s": kv.lease_s,
            "max_held_bytes": kv.max_held_bytes,
            "staging_bytes": kv.staging,
            "pull_timeout_s": kv.pull_timeout_s,
            "tls": None if kv.tls is None else kv.tls.model_dump(),
            "streams": kv.streams,
            "stages_layers": role is Role.PREFILL,
            "peer_tensor_parallel_size": peer.tensor_parallel_size,
            "peer_pipeline_parallel_size": peer.pipeline_parallel_size,
            "adapters": sorted(f"{name}={path}" for name, path in model.adapters.items()),
        },
    )


def _worker() -> str:
    if current_platform.is_cpu():
        return "cpu.cpu_worker.SparseCPUWorker"
    return "gpu.gpu_worker.SparseGPUWorker"


def _uses_v2(args: AsyncEngineArgs) -> bool:
    """Return whether vLLM will choose the V2 model runner.

    Asked of a copy: creating a configuration fills in the sizes that `args` leaves open.
    """
    return bool(vllm_config(copy(args)).use_v2_model_runner)


def _replay(*, v2: bool) -> str:
    """Return the replay processor for the model runner."""
    processor = "replay_v2:ReplayTokensV2" if v2 else "replay:ReplayTokens"
    return f"{_MODULE}.sparse.{processor}"


def _speculation(speculation: SpeculationConfig, *, v2: bool) -> dict[str, Any]:
    """Return vLLM's `speculative_config`, whose proposer the worker replaces.

    V1: a schedule of one entry turns off vLLM's placeholder drafts in the first step after a
    pull, whose rows would get no logits processors.
    """
    ours = {
        "num_speculative_tokens": speculation.tokens,
        "prompt_lookup_min": speculation.min_match,
        "prompt_lookup_max": speculation.max_match,
    }
    if v2:
        return {"method": "ngram_gpu", **ours}
    schedule = [(1, 1, speculation.tokens)]
    return {"method": "ngram", "num_speculative_tokens_per_batch_size": schedule, **ours}
