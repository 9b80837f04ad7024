"""Sparse positions on vLLM's V1 model runners, shared by their CPU and GPU subclasses."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from vllm.v1.core.sched.output import SchedulerOutput

from .batch import SparseBatch


class SparseRunner(Protocol):
    """A V1 model runner that remembers its sparse requests."""

    sparse_batch: SparseBatch
    input_batch: Any
    requests: dict[str, Any]


def rewrite_positions(
    runner: SparseRunner, scheduler_output: SchedulerOutput, positions: torch.Tensor
) -> None:
    """Turn a step's cache slots, `[tokens]` or `[rows, tokens]`, into positions, in place."""
    runner.sparse_batch.forget(scheduler_output.finished_req_ids)
    runner.sparse_batch.rewrite(
        positions,
        runner.input_batch.req_ids,
        scheduler_output.num_scheduled_tokens,
        runner.requests,
    )
