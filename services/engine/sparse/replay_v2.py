"""The same replay as `replay`, for the V2 model runner's interface."""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from ..params import replay_of
from .replay import force_token


class ReplayTokensV2(LogitsProcessor):  # type: ignore[misc]
    """Masks everything but the next replayed token, by request slot.

    A step costs O(vocabulary) per request that still replays, and nothing for the others: all
    lengths are known on the host. One logits row per request is assumed; the guard refuses
    speculative decoding, which has more.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__(vllm_config, req_states)
        self._states = req_states
        self._replays: dict[int, list[int]] = {}  # by slot

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember the slot's replay, and forget its last occupant's."""
        self._replays.pop(req_idx, None)
        replay = replay_of(sampling_params)
        if replay:
            self._replays[req_idx] = replay
        return bool(replay)

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Force rows whose request still replays. `logits` is `[requests, vocab]` float32."""
        if not self._replays:
            return logits
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            if slot in self._replays:
                self._force_row(logits[row], slot, int(ctx.seq_lens_upper_bound_np[row]))
        return logits

    def _force_row(self, row: torch.Tensor, slot: int, visible_tokens: int) -> None:
        """Force output token `visible_tokens - prompt tokens`; forget a replay that is over."""
        replay = self._replays[slot]
        output = visible_tokens - int(self._states.prompt_len.np[slot])
        if output >= len(replay):
            del self._replays[slot]
        elif output >= 0:  # else the prompt goes on: vLLM discards the sampled token
            force_token(row, replay[output])
