"""Sparse positions for vLLM's V2 model runner, the default on GPUs.

The runner asks its model state for extra model inputs every step; this one returns
`positions`. Cache slots are computed elsewhere and stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext
from vllm.v1.worker.gpu.states import RequestState

from ...core.errors import UnsupportedModel
from ..params import positions_of, whole_prompt
from ..speculation.proposer_v2 import DeviceHistories, speculate_from_prompts
from ..vllm_internals import check_v2_runner
from .batch import SparseSlots


class SparseModelState(DefaultModelState):  # type: ignore[misc]
    """vLLM's default model state, with positions mapped per request slot."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._sparse_slots = SparseSlots(self.max_num_reqs, self.device, self.max_model_len - 1)
        self.histories: DeviceHistories | None = None  # of an engine that speculates
        # Captured CUDA graphs read this very buffer.
        self._positions = torch.zeros(self.max_num_tokens, dtype=torch.int64, device=self.device)

    def add_request(self, req_index: int, new_req_data: NewRequestData) -> None:
        """Remember the request's mapping, and its whole prompt where proposals need it."""
        super().add_request(req_index, new_req_data)
        params = new_req_data.sampling_params
        self._sparse_slots.occupy(req_index, positions_of(params))
        if self.histories is not None and params is not None:
            kept, tokens = new_req_data.prompt_token_ids, new_req_data.prefill_token_ids
            prompt = whole_prompt(params, kept)
            self.histories.enter(req_index, prompt, len(kept), tokens[len(kept) :])

    def prepare_inputs(
        self, input_batch: InputBatch, req_states: RequestState
    ) -> dict[str, torch.Tensor | None]:
        """Return the inputs with the batch's positions, `[..., num_tokens_after_padding]`."""
        inputs: dict[str, torch.Tensor | None] = super().prepare_inputs(input_batch, req_states)
        out = inputs.get("positions")  # multimodal rope's, `[rows, tokens]`: vLLM's own buffer
        if out is None:
            out = self._positions[: input_batch.num_tokens_after_padding]
            out.copy_(input_batch.positions)
        requests = input_batch.num_reqs
        starts = input_batch.query_start_loc_np[: requests + 1].tolist()
        self._sparse_slots.rewrite(
            out[..., : input_batch.num_tokens],
            input_batch.idx_mapping[:requests],
            input_batch.query_start_loc[: requests + 1],
            zip(
                input_batch.idx_mapping_np[:requests].tolist(),
                starts[:-1],
                starts[1:],
                input_batch.num_computed_tokens_np[:requests].tolist(),
                strict=True,
            ),
        )
        return {**inputs, "positions": out}

    def prepare_dummy_inputs(self, num_reqs: int, num_tokens: int) -> dict[str, Any]:
        """Return views of the same buffer, so that graphs are captured on it."""
        inputs: dict[str, Any] = super().prepare_dummy_inputs(num_reqs, num_tokens)
        return {"positions": self._positions[:num_tokens], **inputs}


class SparseHybridModelState(SparseModelState, MambaHybridModelState):  # type: ignore[misc]
    """vLLM's model state for recurrent layers beside attention, with positions mapped likewise.

    Recurrent layers have none: they read a request's tokens in the order of its slots.
    """


def check_runner_class(runner: type) -> None:
    """Raise IncompatibleVllm unless `runner`, vLLM's V2 runner, is as it is used here."""
    for state in (DefaultModelState, MambaHybridModelState):
        check_v2_runner(runner, state, InputBatch, LogitsContext)


def make_sparse(runner: Any) -> None:
    """Replace the model state that `runner` has made, and its speculator, if any.

    Raises UnsupportedModel for a model that brings its own state: its extra inputs may
    depend on positions in ways that are not known here.
    """
    state = runner.model_state
    kinds: dict[type, type[SparseModelState]] = {
        DefaultModelState: SparseModelState,
        MambaHybridModelState: SparseHybridModelState,
    }
    kind = kinds.get(type(state))
    if kind is None:
        raise UnsupportedModel(f"{type(state).__name__}: no sparse positions for this model")
    encoder_cache = state.encoder_cache if state.supports_mm_inputs else None
    sparse = kind(state.vllm_config, state.model, encoder_cache, state.device)
    sparse.histories = speculate_from_prompts(runner)
    runner.model_state = sparse
