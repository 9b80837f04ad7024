"""The same replay as `replay`, for the V2 model runner's interface."""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from .params import replay_of


class ReplayTokens(LogitsProcessor):  # type: ignore[misc]
    """Masks everything but the next replayed token, by request slot."""

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__(vllm_config, req_states)
        self._states = req_states
        self._replays: dict[int, torch.Tensor] = {}  # slot -> [tokens] int64

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember the slot's replay, and forget its last occupant's."""
        self._replays.pop(req_idx, None)
        replay = replay_of(sampling_params)
        if replay:
            self._replays[req_idx] = torch.tensor(replay, device=self._states.device)
        return bool(replay)

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Force rows whose request still replays. `logits` is `[rows, vocab]` float32."""
        for slot in self._replays.keys() & set(ctx.idx_mapping_np.tolist()):
            _force_slot(logits, ctx, slot, self._replays[slot], self._states.prompt_len.gpu[slot])
        return logits


def _force_slot(
    logits: torch.Tensor, ctx: Any, slot: int, replay: torch.Tensor, prompt_len: torch.Tensor
) -> None:
    """All on the device: row r samples output token `pos[r] + 1 - prompt_len`."""
    output = ctx.pos + 1 - prompt_len
    forced = (ctx.expanded_idx_mapping == slot) & (output >= 0) & (output < len(replay))
    token = replay[output.clamp(0, len(replay) - 1).long()]
    columns = torch.arange(logits.shape[1], device=logits.device)
    other = forced[:, None] & (columns != token[:, None])
    logits.masked_fill_(other, float("-inf"))
    own = forced[:, None] & (columns == token[:, None]) & logits.isneginf()
    logits.masked_fill_(own, 0.0)
