"""The jobs of a run: their order, their neighbours, and their time limits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .parity import VARIANTS

LIMIT_S, CPU_LIMIT_S = 210.0, 420.0
LATENCY_LIMIT_S = 310.0
OURS, PLAIN = "ours", "plain"  # whose inter-token latency
PARTS = ("kernels", "parity", "handover", "latency", "itl")
_TIMED = frozenset({"latency", "itl"})


@dataclass(frozen=True, slots=True)
class ProofJob:
    """One part in a process of its own."""

    part: str
    variant: str | None = None
    limit_s: float = LIMIT_S

    @property
    def name(self) -> str:
        """The name in the results."""
        return self.part if self.variant is None else f"{self.part}:{self.variant}"

    @property
    def is_timed(self) -> bool:
        """True if the job measures once it has the device to itself."""
        return self.part in _TIMED


Wave = tuple[ProofJob, ...]  # they start together; a timed one measures when the others have ended

# What matters most, and what takes longest, comes first. An engine takes 45 to 60 s to start
# on a GPU, five beside each other 90 s; the services of `latency` start one after the other, and
# fill 60 GB: in 80 GB there is room for five small engines beside them.
GPU_PLAN: tuple[Wave, ...] = (
    (
        ProofJob("kernels"),
        ProofJob("parity", "v2-flash-eager"),
        ProofJob("parity", "v2-triton-eager-fp32"),
        ProofJob("parity", "v1-triton-eager-fp32"),
        ProofJob("handover", "grpc"),
        ProofJob("latency", limit_s=LATENCY_LIMIT_S),
    ),
    (
        ProofJob("itl", OURS),
        ProofJob("itl", PLAIN),
        ProofJob("handover", "grpc+graphs"),
        ProofJob("handover", "nixl"),
        ProofJob("parity", "v2-flash-default-decode"),
        ProofJob("parity", "v2-flash-default-prefill"),
        ProofJob("parity", "v2-flash-fullgraph"),
        ProofJob("parity", "v2-triton-fullgraph"),
        ProofJob("parity", "v1-flash-fullgraph"),
        ProofJob("parity", "v1-flash-default-prefill"),
    ),
)
CPU_PLAN: tuple[Wave, ...] = tuple(
    (ProofJob(part, variant, CPU_LIMIT_S),)
    for part, variant in (
        ("kernels", None),
        ("parity", "cpu-v1"),
        ("handover", "grpc"),
        ("latency", None),
        ("itl", OURS),
        ("itl", PLAIN),
        ("handover", "nixl"),
        ("parity", "cpu-v2"),
    )
)
SHORT_PLAN: tuple[Wave, ...] = (
    (ProofJob("parity", "cpu-v1", CPU_LIMIT_S), ProofJob("latency", "short", CPU_LIMIT_S)),
)


def plan(*, cpu: bool, short: bool) -> tuple[Wave, ...]:
    """Return the waves of a run."""
    if short:
        return SHORT_PLAN
    return CPU_PLAN if cpu else GPU_PLAN


def jobs_named(names: Iterable[str], *, cpu: bool) -> tuple[Wave, ...]:
    """Return jobs by name, one after the other. Raises ValueError for an unknown one."""
    known = {job.name: job for wave in (*GPU_PLAN, *CPU_PLAN, *SHORT_PLAN) for job in wave}
    waves = []
    for name in names:
        if name not in known:
            raise ValueError(f"--parts: {name!r} is none of {', '.join(sorted(known))}")
        limit_s = CPU_LIMIT_S if cpu else known[name].limit_s
        waves.append((ProofJob(known[name].part, known[name].variant, limit_s),))
    return tuple(waves)


def models_with_weights(waves: Iterable[Wave], dtype: str) -> set[tuple[str, str]]:
    """Return (model, dtype) that several jobs of `waves` read; `dtype` is the device's own."""
    models = set()
    for job in (job for wave in waves for job in wave):
        if job.part == "parity" and job.variant is not None:
            models.add((VARIANTS[job.variant].model, VARIANTS[job.variant].dtype))
        if job.part == "handover":
            models.add(("tiny" if dtype == "float32" else "wide", dtype))
    return models
