"""The memory, the cores and the GPUs of this machine. Imports no framework."""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_CPUINFO = Path("/proc/cpuinfo")
_CGROUP = Path("/sys/fs/cgroup")  # version 2, as seen from inside a container
_FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
_NVIDIA_SMI = ("nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
_ASK_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class LocalMachine:
    """The resources that the pools of one deployment may use together."""

    memory_bytes: int  # of the host, that is free now
    cores: int
    gpus: tuple[int, ...] = ()  # bytes of memory of each
    fast_bfloat16: bool = False  # the CPU multiplies bfloat16 itself


def read_machine() -> LocalMachine:
    """Measure this machine, within the limits of the container that this process is in."""
    free, allowed = _free_memory(), container_memory()
    return LocalMachine(
        memory_bytes=free if allowed is None else min(free, allowed),
        cores=usable_cores(),
        gpus=tuple(_gpu_memory()),
        fast_bfloat16=has_fast_bfloat16(_CPUINFO.read_text(encoding="utf-8")),
    )


def _free_memory() -> int:
    lines = _MEMINFO.read_text(encoding="utf-8").splitlines()
    free = next(line for line in lines if line.startswith("MemAvailable:"))
    return int(free.split()[1]) << 10


def container_memory(folder: Path = _CGROUP) -> int | None:
    """Return the bytes that the container may still take; None without a limit.

    Pages of files that were not used lately count as free: the kernel drops them on demand.
    """
    try:
        limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
        used = int((folder / "memory.current").read_text(encoding="utf-8"))
        stat = (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
    except OSError:  # no container, or version 1
        return None
    idle = sum(int(line.split()[1]) for line in stat if line.startswith("inactive_file "))
    return None if limit == "max" else max(0, int(limit) - used + idle)


def usable_cores() -> int:
    """Return the cores that this process may use, within the limits of its container."""
    cores, most_cores = len(os.sched_getaffinity(0)), container_cores()
    return cores if most_cores is None else min(cores, most_cores)


def container_cores(folder: Path = _CGROUP) -> int | None:
    """Return the cores whose time the container may take, rounded up; None without a limit."""
    try:
        quota, period = (folder / "cpu.max").read_text(encoding="utf-8").split()
    except OSError:  # no container, or version 1
        return None
    return None if quota == "max" else math.ceil(int(quota) / int(period))


def _gpu_memory() -> Iterator[int]:
    """Yield the memory of each GPU that CUDA would show to this process."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return
    try:
        asked = subprocess.run(
            _NVIDIA_SMI, capture_output=True, text=True, timeout=_ASK_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):  # no driver, so no GPU
        return
    sizes = [int(line) << 20 for line in asked.stdout.split()]
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        yield from sizes
        return
    for name in visible.split(","):  # numbers; a UUID stands for one that is as large as the first
        index = int(name) if name.strip().isdecimal() else 0
        if index < len(sizes):
            yield sizes[index]


def has_fast_bfloat16(cpuinfo: str) -> bool:
    """Return True if the first processor has an instruction for it."""
    flags = next((line for line in cpuinfo.splitlines() if line.startswith(("flags", "Feat"))), "")
    return any(name in flags.split() for name in _FAST_BFLOAT16)
