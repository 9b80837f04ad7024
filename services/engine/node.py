"""The software and devices of this node, and how vLLM uses them.

Reads configurations and asks the drivers; loads no weights and allocates no device memory.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.platforms import current_platform
from vllm.v1.attention.selector import get_attn_backend
from vllm.version import __version__ as vllm_version

from ..config import EngineConfig, KvConfig, MainModel
from ..core.errors import IncompatibleVllm, InvalidConfiguration
from ..kv.nixl.agent import agent_for
from .args import Role, engine_args, vllm_config
from .support import engine_support, is_served
from .vllm_internals import check_cpu_caches, check_v1_runner, check_v1_speculation

_GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class Fact:
    """One line of a report. `wrong` means that an engine would fail at start."""

    name: str
    value: str
    wrong: bool = False


def node_facts(gpus_needed: float = 0.0) -> Iterator[Fact]:
    """Yield versions and devices; `gpus_needed` is what one replica asks of Ray."""
    cuda = torch.version.cuda
    yield Fact("python", platform.python_version())
    yield Fact("torch", f"{torch.__version__}, CUDA {cuda or 'none'}")
    yield Fact("vllm", f"{vllm_version} for {current_platform.device_type or 'no device'}")
    yield _check_fact("vllm's private names", "as the engines use them", _check_private_names)
    yield from _device_facts(gpus_needed)


def _device_facts(gpus_needed: float) -> Iterator[Fact]:
    if not current_platform.device_type:
        yield Fact("device", "none that vLLM knows", wrong=True)
        return
    count = current_platform.device_count()
    for index in range(count):
        name = current_platform.get_device_name(index)
        memory = current_platform.get_device_total_memory(index) / _GIB
        yield Fact(f"device {index}", f"{name}, {memory:.1f} GiB")
    found = 0 if current_platform.is_cpu() else count
    if gpus_needed > found:
        yield Fact(
            "devices", f"a replica asks for {gpus_needed:g} GPUs, this node has {found}", wrong=True
        )


def carrier_facts(kv: KvConfig) -> Iterator[Fact]:
    """Yield the carriers of KV between this node and others."""
    try:
        nixl = agent_for("nixl", encrypted=False)
        assert nixl is not None  # or it raises
        found = f"works over {', '.join(nixl.transports)}; plugins: {', '.join(nixl.plugins)}"
        yield Fact("nixl", found)
    except InvalidConfiguration as error:
        nixl = None
        reason = str(error).removeprefix("kv.carrier: ")
        yield Fact("nixl", reason, wrong=kv.carrier == "nixl")
    if kv.carrier == "auto":
        chosen = "grpc" if nixl is None or kv.tls is not None else "nixl"
        yield Fact("kv carrier", f"{chosen} (kv.carrier: auto)")
    else:
        yield Fact("kv carrier", kv.carrier)


def engine_facts(
    role: Role, model: MainModel, engine: EngineConfig, kv: KvConfig
) -> Iterator[Fact]:
    """Yield facts about the deployment's engines on this node, or why one would not start."""
    pool = role.name.lower()
    support = engine_support(model, engine)
    if not is_served(support):
        for reason in support.reasons:
            yield Fact(pool, f"{model.path}: {reason}", wrong=True)
        return
    try:
        config = vllm_config(engine_args(model, engine, kv, role, hands_over=support.hands_over))
    except (ValueError, TypeError, RuntimeError, OSError) as error:
        yield Fact(pool, f"{model.path}: vLLM refuses it: {error}", wrong=True)
        return
    yield Fact(pool, f"{model.path}: can run")
    yield Fact(f"{pool} mode", "; ".join((support.mode, *support.lines())))
    yield from _choice_facts(pool, config)


def _choice_facts(pool: str, config: VllmConfig) -> Iterator[Fact]:
    scheduler = config.scheduler_config
    v2 = bool(config.use_v2_model_runner)
    yield Fact(f"{pool} model runner", "V2" if v2 else "V1")
    if v2:
        yield _check_fact(f"{pool} V2's private names", "as the engines use them", _check_v2_names)
    if config.speculative_config is not None:
        most = config.speculative_config.num_speculative_tokens
        check = _check_v2_speculation if v2 else _check_v1_speculation
        yield _check_fact(f"{pool} speculation", f"up to {most} tokens a step", check)
    yield _attention_backend(pool, config)
    yield Fact(
        f"{pool} sizes",
        f"{scheduler.max_num_batched_tokens} tokens and {scheduler.max_num_seqs} requests a step, "
        f"{config.model_config.max_model_len} tokens a request",
    )


def _attention_backend(pool: str, config: VllmConfig) -> Fact:
    model = config.model_config
    name = f"{pool} attention backend"
    try:
        with set_current_vllm_config(config):
            backend = get_attn_backend(
                model.get_head_size(),
                model.dtype,
                config.cache_config.cache_dtype,
                use_mla=model.use_mla,
            )
    except (ValueError, ImportError, NotImplementedError) as error:
        return Fact(name, f"none: {error}", wrong=True)
    return Fact(name, str(backend.get_name()))


def _check_fact(name: str, fine: str, check: Callable[[], None]) -> Fact:
    try:
        check()
    except IncompatibleVllm as error:
        return Fact(name, str(error), wrong=True)
    return Fact(name, fine)


def _check_private_names() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    check_v1_runner(GPUModelRunner)
    if current_platform.is_cpu():
        check_cpu_caches()


def _check_v2_names() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from .sparse.model_state import check_runner_class

    check_runner_class(GPUModelRunner)


def _check_v1_speculation() -> None:
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    check_v1_speculation(GPUModelRunner)


def _check_v2_speculation() -> None:
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from .speculation.proposer_v2 import check_speculator_class

    check_speculator_class(GPUModelRunner)
