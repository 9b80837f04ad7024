"""vLLM's n-gram speculator over whole prompts, for the V2 model runner.

The search is vLLM's kernel; the tokens are read and kept on the device, without waiting for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from vllm.config import VllmConfig
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.ngram.speculator import NgramGPUSpeculator
from vllm.v1.worker.gpu.states import RequestState

from ..vllm_internals import check_v2_speculation
from .history import Tokens


@dataclass(slots=True)
class _DeviceTensor:
    """A tensor where vLLM's speculator looks for it."""

    gpu: torch.Tensor


class DeviceHistories:
    """The tokens that proposals are copied from, by the runner's request slot.

    Has the two fields that vLLM's speculator reads of its request states.
    """

    def __init__(self, states: RequestState, device: torch.device) -> None:
        self._states = states
        size = (states.max_num_reqs, states.max_model_len)
        self.all_token_ids = _DeviceTensor(torch.zeros(size, dtype=torch.int32, device=device))
        self.total_len = _DeviceTensor(states.total_len.gpu)
        self._shift = torch.zeros(states.max_num_reqs, dtype=torch.int32, device=device)

    def enter(self, slot: int, prompt: Tokens, kept: int, output: Sequence[int]) -> None:
        """Start a request's history: the whole prompt, `[N]`, and the output of an earlier run."""
        tokens = np.concatenate((prompt, np.asarray(output, dtype=np.int32)))
        row = self.all_token_ids.gpu[slot]
        row[: len(tokens)] = torch.from_numpy(tokens).to(row.device)
        self._shift[slot] = len(prompt) - kept

    def append(self, slots: torch.Tensor, most: int) -> None:
        """Copy the last tokens, at most `most` of each request, to where they stand here.

        `slots` is `[requests]`. Tokens that stand there already are copied once more.
        """
        states, tokens = self._states, self.all_token_ids.gpu
        self.total_len.gpu = states.total_len.gpu + self._shift
        last = states.total_len.gpu[slots] - 1
        source = (last[:, None] - torch.arange(most, device=last.device)).clamp(min=0)
        rows = slots[:, None].expand_as(source)
        is_output = source >= states.prompt_len.gpu[slots][:, None]
        target = (source + self._shift[slots][:, None]).clamp(max=tokens.shape[1] - 1).long()
        new = states.all_token_ids.gpu[rows, source.long()]
        tokens[rows, target] = torch.where(is_output, new, tokens[rows, target])


class PromptSpeculator(NgramGPUSpeculator):  # type: ignore[misc]
    """Proposes what follows the answer's last tokens elsewhere in the whole prompt or answer."""

    def __init__(self, config: VllmConfig, device: torch.device, states: RequestState) -> None:
        self.histories = DeviceHistories(states, device)
        super().__init__(config, device, self.histories)

    def propose(self, input_batch: InputBatch, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return `[requests, num_speculative_tokens]` int64; see vLLM's `propose`."""
        if not kwargs.get("dummy_run", False):
            slots = input_batch.idx_mapping[: input_batch.num_reqs].long()
            self.histories.append(slots, self.num_speculative_steps + 1)
        return super().propose(input_batch, *args, **kwargs)


def speculate_from_prompts(runner: Any) -> DeviceHistories | None:
    """Replace the speculator that vLLM has made for `runner`; return its histories, if any."""
    if runner.speculator is None:
        return None
    check_speculator_class(type(runner))
    runner.speculator = PromptSpeculator(runner.vllm_config, runner.device, runner.req_states)
    histories: DeviceHistories = runner.speculator.histories
    return histories


def check_speculator_class(runner: type) -> None:
    """Raise IncompatibleVllm unless `runner`, vLLM's V2 runner, proposes as it is used here."""
    check_v2_speculation(runner, RequestState, NgramGPUSpeculator)
