"""vLLM's own n-gram kernel over whole prompts, in a process with Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest

from .conftest import INTERPRETER

pytestmark = pytest.mark.integration

# Slot 2 keeps tokens 1, 39 and 40 of 1 .. 40 and has written 99, 11, 12; slot 0 is dense.
SCRIPT = """
import json
from types import SimpleNamespace as Values

import numpy as np
import torch

from specprefill.engine.speculation.proposer_v2 import PromptSpeculator


def integers(*size):
    return torch.zeros(size, dtype=torch.int32)


states = Values(
    max_num_reqs=4,
    max_model_len=128,
    all_token_ids=Values(gpu=integers(4, 128)),
    total_len=Values(gpu=integers(4)),
    prompt_len=Values(gpu=integers(4)),
)
config = Values(
    speculative_config=Values(prompt_lookup_min=2, prompt_lookup_max=4, num_speculative_tokens=4),
    scheduler_config=Values(max_num_seqs=4),
    model_config=Values(max_model_len=128),
)
speculator = PromptSpeculator(config, torch.device("cpu"), states)
for slot, prompt, kept, output in (
    (2, range(1, 41), [1, 39, 40], [99, 11, 12]),
    (0, [5, 6, 7, 5], [5, 6, 7, 5], [6]),
):
    tokens = torch.tensor([*kept, *output])
    states.all_token_ids.gpu[slot, : len(tokens)] = tokens
    states.prompt_len.gpu[slot], states.total_len.gpu[slot] = len(kept), len(tokens)
    speculator.histories.enter(slot, np.array(prompt, dtype=np.int32), len(kept), ())
batch = Values(num_reqs=2, idx_mapping=torch.tensor([2, 0], dtype=torch.int32))
sampled, last = torch.tensor([3, 1], dtype=torch.int32), torch.tensor([[6], [0], [12], [0]])
proposals = speculator.propose(
    batch, None, None, None, None, sampled, integers(2), last, None, None, None
)
print(json.dumps(proposals.tolist()))
"""


def test_the_kernel_finds_dropped_tokens():
    """A proposal shorter than four tokens is filled up with the last one."""
    environment = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
        "PYTHONPATH": str(INTERPRETER),
    }
    command = [sys.executable, "-W", "ignore", "-c", SCRIPT]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1]) == [[13, 14, 15, 16], [7, 5, 6, 6]]
