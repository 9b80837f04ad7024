"""Several processes that train one model: each draws its own samples, all take the same step.

`torchrun --nproc-per-node 2 models/train.py ...` starts them; one process alone needs nothing.
"""

from __future__ import annotations

import os

import torch
from torch import distributed
from torch.nn.utils import parameters_to_vector, vector_to_parameters


def join() -> int:
    """Meet the other processes, if any; return the number of this one among them."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0
    distributed.init_process_group("gloo")
    return distributed.get_rank()


def average(model: torch.nn.Module, accuracy: float) -> float:
    """Replace the gradients by their mean over all processes; return the mean accuracy."""
    if not distributed.is_initialized():
        return accuracy
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    flat = torch.cat([parameters_to_vector(gradients), torch.tensor([accuracy])])
    distributed.all_reduce(flat, op=distributed.ReduceOp.SUM)
    flat /= distributed.get_world_size()
    vector_to_parameters(flat[:-1], gradients)
    return flat[-1].item()
