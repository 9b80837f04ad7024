"""Settings that depend on where the proof runs: one GPU, or a CPU with small shapes."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specprefill.config import EngineConfig, KvConfig, MainModel, local_path

from ..cpu_environment import CPU_ENVIRONMENT

MAX_TOKENS = 8192  # of the small models
CPU_BLOCK_TOKENS = 32
SMALL_CHUNK_TOKENS = 512  # of the small engines' chunked prefill
SMALL_SEQUENCES = 32  # of the small engines' batches
SMALL_SHARE = 0.03  # of the GPU's memory, that must be free when a small engine starts

_COMMON = {
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "NCCL_SOCKET_IFNAME": "lo",
    "TP_SOCKET_IFNAME": "lo",
}
_GPU = {
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_PLUGINS": "",
    "OMP_NUM_THREADS": "4",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_LOGGING_LEVEL": "WARNING",
}
# Triton's interpreter stands in for a CPU backend, for vLLM's V2 runner.
_INTERPRETER = Path("tests/integration/interpreter")


@dataclass(frozen=True, slots=True)
class ProofMachine:
    """One GPU, or a CPU on which times mean nothing."""

    cpu: bool

    @property
    def device(self) -> str:
        """The device's name in torch."""
        return "cpu" if self.cpu else "cuda"

    @property
    def dtype(self) -> str:
        """The dtype of the models served here."""
        return "float32" if self.cpu else "bfloat16"

    def environment(self) -> dict[str, str]:
        """Return the environment of every part's process."""
        if not self.cpu:
            return _COMMON | _GPU
        return _COMMON | CPU_ENVIRONMENT

    def engine(
        self,
        sizes: dict[str, Any],
        *,
        share: float,
        backend: str | None = None,
        **engine_args: Any,
    ) -> EngineConfig:
        """Return an engine that shares the device; `backend` None leaves attention to vLLM."""
        if self.cpu:
            return EngineConfig(
                **{"block_size": CPU_BLOCK_TOKENS, **sizes}, engine_args=engine_args
            )
        ours: dict[str, Any] = {"gpu_memory_utilization": share}
        if backend is not None:
            ours["attention_backend"] = backend
        return EngineConfig(**sizes, engine_args={**ours, **engine_args})

    def small_engine(
        self, *, eager: bool, backend: str | None = None, **engine_args: Any
    ) -> EngineConfig:
        """Return an engine for parity: several of them share the device."""
        sizes = {
            "kv_cache_memory_bytes": (96 if self.cpu else 512) << 20,
            "max_num_batched_tokens": SMALL_CHUNK_TOKENS,
            "max_num_seqs": SMALL_SEQUENCES,
            "enforce_eager": eager,
        }
        return self.engine(sizes, share=SMALL_SHARE, backend=backend, **engine_args)


def main_model(folder: str, dtype: str, max_tokens: int, *, weights: bool) -> MainModel:
    """Return the configuration of a model folder."""
    return MainModel.model_validate(
        {
            "path": folder,
            "dtype": dtype,
            "max_model_len": max_tokens,
            "load_format": "auto" if weights else "dummy",
        }
    )


def links(**values: Any) -> KvConfig:
    """Return the KV configuration between engines of one machine."""
    return KvConfig.model_validate(
        {
            "host": "127.0.0.1",
            "carrier": "grpc",
            "on_failure": "recompute",
            "local_prefill_tokens": 0,
            **values,
        }
    )


def interpret_triton() -> dict[str, str] | None:
    """Return the environment of vLLM's V2 runner on a CPU; None outside a source checkout."""
    folder = Path(local_path(str(_INTERPRETER)))
    if not (folder / "sitecustomize.py").exists():
        return None
    path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
    return {"TRITON_INTERPRET": "1", "PYTHONPATH": path}


@contextlib.contextmanager
def device_to_itself(out: Path) -> Iterator[None]:
    """Wait until no part that started beside this one uses the device, and keep it so."""
    with lock_file(out).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def lock_file(out: Path) -> Path:
    """Return the file that every untimed part locks, shared, for its life."""
    return out / "device.lock"
