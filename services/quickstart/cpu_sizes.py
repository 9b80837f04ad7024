"""Sizes on a machine without GPUs. Pure."""

from __future__ import annotations

from ..core.errors import InvalidConfiguration
from .local_machine import LocalMachine
from .shapes import ModelShape
from .sizes import (
    BLOCK_TOKENS,
    FREE_SHARE,
    GIB,
    HELD_AT_ONCE,
    LEAST_TOKENS,
    DraftSizes,
    EngineSizes,
    PoolSizes,
    Speed,
    gib,
    itemsize_of,
    whole_blocks,
    whole_mib,
)

_PROCESSES = 6 * GIB  # Ray, two gateways, three replicas and two engines, without their models
_MOST_TOKENS = 32_768  # longer prompts take a CPU many minutes
_MOST_AT_ONCE = 8  # requests of the longest kind whose KV has room
_SEQUENCES = 16
_STEP_S = 2.0  # a step is not interrupted
_STEP_TOKENS = (64, 512)  # at least, at most
_USUAL_CORE = 3e10  # operations a second
_SLOW_CORE = 5e9
_SLOW_READ = 4e9


def cpu_sizes(
    machine: LocalMachine, main: ModelShape, draft: ModelShape, longest: int | None
) -> PoolSizes:
    """Return sizes that fit; `longest` bounds a prompt with its answer.

    Raises InvalidConfiguration with what is needed and what is free.
    """
    usable = int(machine.memory_bytes * FREE_SHARE) - _PROCESSES
    dtype = _dtype(machine, main, draft, usable)
    itemsize = itemsize_of(dtype)
    room = usable - 2 * main.memory(itemsize) - draft.memory(itemsize)
    kv, draft_kv = main.kv_bytes(itemsize), draft.kv_bytes(itemsize)
    each = (2 + HELD_AT_ONCE) * kv + draft_kv
    wanted = min(main.positions or _MOST_TOKENS, longest or _MOST_TOKENS)
    tokens = min(wanted, whole_blocks(room // each))
    least = min(LEAST_TOKENS, wanted) if longest is None else wanted
    if tokens < least:
        raise InvalidConfiguration(_need(least, usable - room, each, usable, longest))
    padded = tokens + BLOCK_TOKENS  # a last block may be filled in part
    at_once = max(1, min(_MOST_AT_ONCE, (room - HELD_AT_ONCE * kv * padded) // (each * padded)))
    engine = EngineSizes(
        threads=threads(machine),
        kv_bytes=whole_mib(at_once * kv * padded),
        step_tokens=_step_tokens(main, threads(machine)),
        sequences=_SEQUENCES,
    )
    return PoolSizes(
        tokens=tokens,
        dtype=dtype,
        prefill=engine,
        decode=engine,
        draft=DraftSizes(whole_mib(at_once * draft_kv * padded), threads(machine)),
        held_bytes=whole_mib(HELD_AT_ONCE * kv * padded),
    )


def cpu_speed(machine: LocalMachine) -> Speed:
    """Return what the slowest usual CPU does with as many cores."""
    return Speed(_SLOW_CORE * threads(machine), _SLOW_READ)


def threads(machine: LocalMachine) -> int:
    """Return the threads of each pool: two of the three are at work at a time."""
    return max(1, machine.cores // 2)


def _dtype(machine: LocalMachine, main: ModelShape, draft: ModelShape, usable: int) -> str:
    """Return float32 where it has room and the CPU would convert every bfloat16."""
    has_room = 2 * main.memory(4) + draft.memory(4) <= usable // 2
    return "float32" if has_room and not machine.fast_bfloat16 else "bfloat16"


def _step_tokens(main: ModelShape, cores: int) -> int:
    least, most = _STEP_TOKENS
    fitting = int(_STEP_S * _USUAL_CORE * cores / (2 * main.parameters))
    return max(least, min(most, whole_blocks(fitting)))


def _need(tokens: int, weights: int, each: int, usable: int, longest: int | None) -> str:
    shorter = "" if longest is None else ", or a smaller --max-model-len"
    return (
        f"prompts of {tokens} tokens need {gib(weights + tokens * each + _PROCESSES)} of memory: "
        f"{gib(weights)} for the weights (the main model is loaded twice), "
        f"{gib(tokens * each)} for keys and values, {gib(_PROCESSES)} for the processes; "
        f"{gib(usable + _PROCESSES)} may be used: choose smaller models{shorter}"
    )
