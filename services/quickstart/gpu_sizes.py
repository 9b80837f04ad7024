"""Sizes on a machine with GPUs: a part of one, one, or several for each pool. Pure."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ..core.errors import InvalidConfiguration
from .local_machine import LocalMachine
from .shapes import NO_DRAFT, ModelShape
from .sizes import (
    FREE_SHARE,
    GIB,
    HELD_AT_ONCE,
    LEAST_TOKENS,
    MIB,
    DraftSizes,
    EngineSizes,
    PoolSizes,
    Speed,
    gib,
    whole_blocks,
    whole_mib,
)

_PROCESS = 3 * GIB  # CUDA's context, graphs and activations of one process on a GPU
_SPLITS = (1, 2, 4, 8)
_ROOMY_TOKENS = 32_768  # of an engine that needs no more GPUs
_MOST_TOKENS = 131_072  # of models without a limit of their own
_LEAST_HELD = 64 * MIB
_MOST_HOST_SHARE = 0.25  # of the host's memory, for KV that waits
GPU_SPEED = Speed(operations=2e13, read_bytes=2e11)


@dataclass(frozen=True, slots=True)
class _Layout:
    """The pools' places on the GPUs, with the memory that is left for KV in each."""

    prefill: EngineSizes
    decode: EngineSizes
    draft: DraftSizes
    tokens: int  # that have room in each


def gpu_sizes(
    machine: LocalMachine, main: ModelShape, draft: ModelShape, longest: int | None
) -> PoolSizes:
    """Return sizes that fit; `longest` bounds a prompt with its answer.

    Raises InvalidConfiguration with what is needed and what there is.
    """
    layout = _layout(machine, main, draft)
    wanted = longest or main.positions or _MOST_TOKENS
    tokens = min(wanted, whole_blocks(layout.tokens))
    if longest is not None and tokens < longest:
        raise InvalidConfiguration(_need(machine, main, draft, longest))
    workers = layout.prefill.tensor_parallel  # each sets aside as much
    held = 4 * HELD_AT_ONCE * main.kv_bytes(None) * tokens // main.kv_parts(workers)
    bound = int(machine.memory_bytes * _MOST_HOST_SHARE) // workers
    return PoolSizes(
        tokens=tokens,
        dtype="auto",
        prefill=layout.prefill,
        decode=layout.decode,
        draft=layout.draft,
        held_bytes=max(_LEAST_HELD, whole_mib(min(held, bound))),
    )


def _layout(machine: LocalMachine, main: ModelShape, draft: ModelShape) -> _Layout:
    """Give every pool GPUs of its own; one or two GPUs are shared."""
    layouts = list(_own_layouts(machine, main, draft))
    if layouts:
        roomy = (layout for layout in layouts if layout.tokens >= _ROOMY_TOKENS)
        return next(roomy, layouts[-1])
    if len(machine.gpus) <= 2:
        return _shared_layout(machine, main, draft)
    raise InvalidConfiguration(_need(machine, main, draft, LEAST_TOKENS))


def _own_layouts(machine: LocalMachine, main: ModelShape, draft: ModelShape) -> Iterator[_Layout]:
    """Yield what fits, with more and more GPUs for each engine."""
    memory = int(min(machine.gpus) * FREE_SHARE)
    own, sizes, draft_tokens = _own_draft(draft, memory)
    for split in _SPLITS:
        if 2 * split + own > len(machine.gpus) or main.heads % split:
            continue
        room = memory - main.memory(None) // split - _PROCESS
        tokens = room * split // main.kv_bytes(None)
        tokens = tokens if draft_tokens is None else min(tokens, draft_tokens)
        if tokens >= LEAST_TOKENS:
            engine = EngineSizes(gpus=split, gpu_share=FREE_SHARE, tensor_parallel=split)
            yield _Layout(engine, engine, sizes, tokens)


def _own_draft(draft: ModelShape, memory: int) -> tuple[int, DraftSizes, int | None]:
    """Return the GPUs of a draft of its own, its sizes, and the tokens that fit; None: any."""
    if draft is NO_DRAFT:
        return 0, DraftSizes(0), None
    room = memory - draft.memory(None) - _PROCESS
    return 1, DraftSizes(whole_mib(room), gpus=1.0), room // draft.kv_bytes(None)


def _shared_layout(machine: LocalMachine, main: ModelShape, draft: ModelShape) -> _Layout:
    """Put all pools on one GPU; or prefill and the draft on one, and decode on another."""
    total = min(machine.gpus)
    engines = 2 if len(machine.gpus) == 1 else 1
    fixed = engines * (main.memory(None) + _PROCESS) + _draft_memory(draft)
    each = engines * main.kv_bytes(None) + draft.kv_bytes(None)
    tokens = whole_blocks((int(total * FREE_SHARE) - fixed) // each)
    if tokens < LEAST_TOKENS:
        raise InvalidConfiguration(_need(machine, main, draft, LEAST_TOKENS))
    kv, draft_kv = tokens * main.kv_bytes(None), tokens * draft.kv_bytes(None)
    share = _share(main.memory(None) + _PROCESS + kv, total)
    # Engines that start side by side on one GPU cannot measure what is theirs.
    prefill = EngineSizes(gpus=share, gpu_share=share, kv_bytes=whole_mib(kv))
    alone = EngineSizes(gpus=1.0, gpu_share=FREE_SHARE)
    draft_share = _share(_draft_memory(draft) + draft_kv, total)
    return _Layout(
        prefill,
        prefill if engines == 2 else alone,
        DraftSizes(whole_mib(draft_kv), gpus=draft_share),
        tokens,
    )


def _draft_memory(draft: ModelShape) -> int:
    """Return the bytes that a draft takes without keys and values."""
    return 0 if draft is NO_DRAFT else draft.memory(None) + _PROCESS


def _share(size: int, total: int) -> float:
    return math.ceil(100 * size / total) / 100


def _need(machine: LocalMachine, main: ModelShape, draft: ModelShape, tokens: int) -> str:
    engine = main.memory(None) + _PROCESS + tokens * main.kv_bytes(None)
    small = _draft_memory(draft) + tokens * draft.kv_bytes(None)
    return (
        f"for prompts of {tokens} tokens prefill and decode need {gib(engine)} of GPU memory each, "
        f"the draft {gib(small)}; of {len(machine.gpus)} GPUs each has "
        f"{gib(min(machine.gpus) * FREE_SHARE)} to use: take a smaller or quantized model, or more "
        "GPUs (1 for the draft, and 1, 2, 4 or 8 each for prefill and decode)"
    )
