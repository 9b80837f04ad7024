"""Sizes of a deployment's pools, and the bounds that every machine has in common. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from .shapes import ModelShape

GIB, MIB = 1 << 30, 1 << 20
BLOCK_TOKENS = 32
FREE_SHARE = 0.9  # of the memory that is free: so much is used
LEAST_TOKENS = 2048  # of a prompt with its answer: shorter ones are not worth pruning
HELD_AT_ONCE = 2  # requests of the longest kind whose KV waits for decode

_ANSWER_TOKENS = 512
_LEAST_REQUEST_S, _LEAST_SCORING_S = 300.0, 10.0
_LEAST_TOKEN_S, _LEAST_PULL_S = 2e-4, 20.0
_LINK = 2e8  # bytes a second between two workers, at least
_LEAST_HEALTH_S = 30.0


@dataclass(frozen=True, slots=True)
class EngineSizes:
    """One engine: its threads or its GPUs, and its caches."""

    threads: int = 1
    gpus: float = 0.0  # that its replica takes; below 1: a part of one
    gpu_share: float | None = None  # of each GPU's memory
    tensor_parallel: int = 1
    kv_bytes: int | None = None  # per worker; None: what its share of the GPU leaves
    step_tokens: int | None = None  # None: vLLM's choice for the device
    sequences: int | None = None


@dataclass(frozen=True, slots=True)
class DraftSizes:
    """One speculator."""

    kv_bytes: int
    threads: int = 1
    gpus: float = 0.0


@dataclass(frozen=True, slots=True)
class PoolSizes:
    """The pools, and the longest request that fits into all of them."""

    tokens: int  # of a prompt with its answer
    dtype: str  # of both models
    prefill: EngineSizes
    decode: EngineSizes
    draft: DraftSizes
    held_bytes: int  # per prefill worker


@dataclass(frozen=True, slots=True)
class Speed:
    """The least that a device does in a second."""

    operations: float
    read_bytes: float  # of weights, once for each token of an answer


@dataclass(frozen=True, slots=True)
class Timeouts:
    """How long the longest request may take, several times what is expected."""

    request_s: float
    scoring_s: float
    scoring_token_s: float
    pull_s: float
    health_s: float  # an engine answers between two steps

    @classmethod
    def of(cls, main: ModelShape, draft: ModelShape, pools: PoolSizes, speed: Speed) -> Timeouts:
        """Estimate them from the operations of both models."""
        tokens, itemsize = pools.tokens, itemsize_of(pools.dtype)
        scoring_token = float(f"{draft.prompt_operations(tokens) / speed.operations / tokens:.1g}")
        prefill = main.prompt_operations(tokens) / speed.operations
        answer = _ANSWER_TOKENS * main.memory(itemsize) / speed.read_bytes
        step = 2 * main.parameters * (pools.prefill.step_tokens or 0) / speed.operations
        scoring_token = max(_LEAST_TOKEN_S, scoring_token)
        scoring = _LEAST_SCORING_S + scoring_token * tokens
        return cls(
            request_s=max(_LEAST_REQUEST_S, 60.0 * ceil((scoring + prefill + answer) / 60)),
            scoring_s=_LEAST_SCORING_S,
            scoring_token_s=scoring_token,
            pull_s=max(_LEAST_PULL_S, float(round(tokens * main.kv_bytes(itemsize) / _LINK))),
            health_s=max(_LEAST_HEALTH_S, float(ceil(2 * step))),
        )


def itemsize_of(dtype: str) -> int | None:
    """Return the bytes of one number; None: as the model is stored."""
    return {"float32": 4, "bfloat16": 2}.get(dtype)


def whole_blocks(tokens: int) -> int:
    """Round down to what KV caches are divided into."""
    return max(0, tokens) // BLOCK_TOKENS * BLOCK_TOKENS


def whole_mib(size: float) -> int:
    """Round up to MiB."""
    return -(-int(size) // MIB) * MIB


def gib(size: float) -> str:
    """Return a size as a person reads it."""
    return f"{size / GIB:.1f} GiB"
