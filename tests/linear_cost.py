"""How the cost of a step grows with the size of what it is given."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

_TRIES, _ROUNDS = 5, 3
# A step of eight times the size costs 8 times as much where the cost is linear, 64 where it is
# quadratic; what no longer fits a cache of the processor costs a few times as much again.
_GROWTH, _MOST = 8, 24.0
_LEAST_S = 1e-3  # of a step that can be timed


def cpu_s(step: Callable[[], object]) -> float:
    """Return the least CPU time of this thread that `step` took in a few tries.

    Without the garbage collector, which walks everything that other tests left in memory.
    """
    taken = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(_TRIES):
            started = time.thread_time()
            step()
            taken.append(time.thread_time() - started)
    finally:
        gc.enable()
    return min(taken)


def assert_linear(make: Callable[[int], Callable[[], object]], size: int) -> None:
    """`make(n)` prepares a step of size n. Its cost must not grow much faster than its size.

    `size` must be large enough that the fixed part of the cost does not hide its growth; it is
    doubled until a step takes long enough to be timed. Others' work on the machine only ever adds
    to a time, so one round of three must be good.
    """
    while cpu_s(make(size)) < _LEAST_S:
        size *= 2
    steps = make(size), make(_GROWTH * size)
    rounds = []
    for _ in range(_ROUNDS):
        small, large = map(cpu_s, steps)
        if large < _MOST * small:
            return
        rounds.append(f"{size}: {small:.4f} s, {_GROWTH * size}: {large:.4f} s")
    raise AssertionError("; ".join(rounds))
