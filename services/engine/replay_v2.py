"""The same replay as `replay`, for the V2 model runner's interface."""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from .params import first_token_of


class ReplayFirstToken(LogitsProcessor):  # type: ignore[misc]
    """Masks everything but the replayed token on a request's first sampled row."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__(vllm_config, req_states)
        self._states = req_states
        self._token = torch.full(
            (req_states.max_num_reqs,), -1, dtype=torch.int64, device=req_states.device
        )
        self._active: set[int] = set()

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember the slot's token, or neutralise its last occupant's."""
        token = first_token_of(sampling_params)
        self._token[req_idx] = -1 if token is None else token
        self._active.discard(req_idx)
        if token is not None:
            self._active.add(req_idx)
        return token is not None

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Rows that sample output token 0 are forced. `logits` is `[rows, vocab]` float32."""
        if self._active.isdisjoint(ctx.idx_mapping_np.tolist()):
            return logits
        slots = ctx.expanded_idx_mapping.long()
        token = self._token[slots]
        first = ctx.pos + 1 == self._states.prompt_len.gpu[slots]
        forced = (first & (token >= 0))[:, None]
        wanted = torch.nn.functional.one_hot(token.clamp(min=0), logits.shape[1]).bool()
        kept = torch.where(wanted, torch.nan_to_num(logits, neginf=0.0), float("-inf"))
        return torch.where(forced, kept, logits)
