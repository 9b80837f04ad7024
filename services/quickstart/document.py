"""A deployment file as text: what `specprefill init` writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from ..deployment.file import GATEWAY
from .sizes import BLOCK_TOKENS, DraftSizes, EngineSizes, PoolSizes, Timeouts

HOST, PORT, GRPC_PORT = "127.0.0.1", 8000, 9000
_SERVICERS = [
    "specprefill.gateway.grpc.serving.add_SpecPrefillServicer_to_server",
    "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
]
_CPU_ENVIRONMENT = {
    "SPECPREFILL_CPU_ENGINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "TORCH_COMPILE_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
_ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "HF_HUB_OFFLINE": "1",  # both models are on this machine
}
_POOL_CPUS = 0.1  # of Ray's count: the pools share the cores


@dataclass(frozen=True, slots=True)
class Choices:
    """What the caller chose: models, addresses, and the keep rate."""

    model: str
    speculator: str | None  # None: prompts are chosen by words
    name: str
    keep: float | str | None = None  # None: the default
    host: str = HOST
    port: int = PORT
    grpc_port: int = GRPC_PORT


def document(choices: Choices, pools: PoolSizes, times: Timeouts) -> str:
    """Return the file's text, with the reasons for its sizes on top."""
    written = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": choices.host, "port": choices.port},
        "grpc_options": {"port": choices.grpc_port, "grpc_servicer_functions": _SERVICERS},
        "applications": [_application(choices, pools, times)],
    }
    body = yaml.safe_dump(written, sort_keys=False, allow_unicode=True)
    return f"{_head(choices, pools)}\n{body}"


def _head(choices: Choices, pools: PoolSizes) -> str:
    place = "GPUs" if pools.decode.gpus else "CPU"
    return (
        f"# {choices.model}, pruned by {choices.speculator or 'the words of questions'}: sizes for "
        f"this machine ({place}).\n"
        f"# The longest prompt with its answer has {pools.tokens} tokens; every KV cache holds at\n"
        "# least one. docs/configuration.md lists all keys, docs/sizing.md the way to a cluster.\n"
    )


def _application(choices: Choices, pools: PoolSizes, times: Timeouts) -> dict[str, Any]:
    on_cpu = not pools.decode.gpus
    return {
        "name": "specprefill",
        "route_prefix": "/",
        "import_path": "specprefill.app:build",
        "runtime_env": {"env_vars": _ENVIRONMENT | (_CPU_ENVIRONMENT if on_cpu else {})},
        "args": {
            "model": {
                "path": choices.model,
                "name": choices.name,
                "dtype": pools.dtype,
                "max_model_len": pools.tokens,
            },
            "speculator": _speculator(choices.speculator, pools, times),
            **({} if choices.keep is None else {"selection": {"keep": choices.keep}}),
            "prefill": _engine(pools.prefill),
            "decode": _engine(pools.decode),
            "kv": {
                "host": "127.0.0.1",
                "max_held_bytes": pools.held_bytes,
                "pull_timeout_s": times.pull_s,
            },
            "gateway": {"request_timeout_s": times.request_s},
        },
        "deployments": [
            {"name": GATEWAY, "num_replicas": 2, "ray_actor_options": {"num_cpus": _POOL_CPUS}},
            _deployment("Speculator", pools.draft, times),
            _deployment("Prefill", pools.prefill, times),
            _deployment("Decode", pools.decode, times),
        ],
    }


def _speculator(path: str | None, pools: PoolSizes, times: Timeouts) -> dict[str, Any]:
    if path is None:
        return {"score_by": "words"}
    on_gpu = pools.draft.gpus > 0
    return {
        "path": path,
        "dtype": pools.dtype,
        "device": "cuda" if on_gpu else "cpu",
        **({} if on_gpu else {"threads": pools.draft.threads}),
        "kv_memory_bytes": pools.draft.kv_bytes,
        "timeout_s": times.scoring_s,
        "timeout_token_s": times.scoring_token_s,
    }


def _engine(sizes: EngineSizes) -> dict[str, Any]:
    limits = {
        "kv_cache_memory_bytes": sizes.kv_bytes,
        "max_num_seqs": sizes.sequences,
        "max_num_batched_tokens": sizes.step_tokens,
    }
    written: dict[str, Any] = {key: value for key, value in limits.items() if value is not None}
    if not sizes.gpus:
        return {
            "block_size": BLOCK_TOKENS,
            **written,
            "enforce_eager": True,
            "cpu_threads": sizes.threads,
        }
    if sizes.tensor_parallel > 1:
        written |= {"tensor_parallel_size": sizes.tensor_parallel, "executor": "mp"}
    return {**written, "engine_args": {"gpu_memory_utilization": sizes.gpu_share}}


def _deployment(name: str, sizes: EngineSizes | DraftSizes, times: Timeouts) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": _POOL_CPUS}
    if sizes.gpus:
        options["num_gpus"] = sizes.gpus
    else:
        options["runtime_env"] = {"env_vars": {"OMP_NUM_THREADS": str(sizes.threads)}}
    return {
        "name": name,
        "num_replicas": 1,
        "health_check_timeout_s": times.health_s,
        "ray_actor_options": options,
    }
