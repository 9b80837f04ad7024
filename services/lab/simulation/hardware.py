"""The machines of `specprefill plan`, where no engines were measured.

An 8B speculator on one H100 and a 70B model on four of them, in bfloat16. Of an H100 SXM (NVIDIA's
data sheet): 989 TFLOP/s dense, 80 GB, 3.35 TB/s. Assumed: half of these operations, six tenths of
this bandwidth. A model's token takes two operations a weight; a pair of a query and a key takes
four times the attention's width, in each layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ...control.scaling.sizing import StageTimes
from ...control.scaling.values import Arrivals, Engines
from ...control.stages import Curve, StageCurves

_FLOPS, _HBM_BYTES_S = 0.5 * 989e12, 0.6 * 3.35e12
_GPUS = 4  # of one prefill or decode replica
# Of a KV carrier, on two cores: 1.2 to 1.4 GB/s over gRPC, 1.3 to 2.2 over NIXL
# (docs/performance.md).
_WORKER_BYTES_S = 1.7e9
_KV_TOKEN_BYTES = 80 * 2 * 8 * 128 * 2.0  # layers, keys and values, heads, dim, bytes
_PULL_BYTES_S = _GPUS * _WORKER_BYTES_S
_USED_BYTES = 0.9  # of a GPU's memory; vLLM's default
_FULL = 0.9  # of a replica's KV memory, at the mean: so that few answers are preempted
_BUSY_LINK = 0.7  # of the link, at the mean: so that pulls rarely wait for each other

ENGINES = Engines(
    StageCurves(
        speculate=Curve(0.02, 2 * 8e9 / _FLOPS, 32 * 4 * 4096 / 2 / _FLOPS),
        prefill=Curve(0.01, 2 * 70e9 / (_GPUS * _FLOPS), 80 * 4 * 8192 / 2 / (_GPUS * _FLOPS)),
        transfer=Curve(0.005, _KV_TOKEN_BYTES / _PULL_BYTES_S),
        first_decode=Curve(0.02, _KV_TOKEN_BYTES / (_GPUS * _HBM_BYTES_S)),
    )
)


@dataclass(frozen=True, slots=True)
class KvLimits:
    """The keys and values that one decode replica holds and takes over, in bytes."""

    token_bytes: float = _KV_TOKEN_BYTES  # of one token, on all GPUs of the replica
    replica_bytes: float = _GPUS * 80e9 * _USED_BYTES - 2 * 70e9
    link_bytes_s: float = _PULL_BYTES_S

    @property
    def longest_tokens(self) -> int:
        """The most tokens of a prompt and its answer that a replica has room for."""
        return int(self.replica_bytes / self.token_bytes)


@dataclass(frozen=True, slots=True)
class DecodeNeeds:
    """The decode replicas that memory and network ask for, beside the time of their slots."""

    memory: int
    network: int

    @classmethod
    def of(
        cls, arrivals: Arrivals, times: StageTimes, per_s: float, limits: KvLimits
    ) -> DecodeNeeds:
        """Return what `per_s` requests like `arrivals` need, at the mean.

        A sequence holds its kept tokens and, on average over its time, half of its answer.
        """
        held = limits.token_bytes * (arrivals.kept_tokens + arrivals.output_tokens / 2)
        held_bytes = per_s * float(np.mean(held * times.decode_s))
        moved = np.where(times.decode_s > 0, arrivals.kept_tokens, 0.0)
        moved_bytes_s = per_s * limits.token_bytes * float(np.mean(moved))
        return cls(
            memory=int(np.ceil(held_bytes / (_FULL * limits.replica_bytes))),
            network=int(np.ceil(moved_bytes_s / (_BUSY_LINK * limits.link_bytes_s))),
        )
