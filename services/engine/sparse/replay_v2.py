"""The same replay as `replay`, for the V2 model runner's interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor

from ..params import replay_of
from .replay import force_token


@dataclass(frozen=True, slots=True)
class _Replay:
    tokens: list[int]
    on_device: torch.Tensor  # [replayed] int64
    prompt: int


class ReplayTokensV2(LogitsProcessor):  # type: ignore[misc]
    """Masks everything but the next replayed token, by request slot.

    A step costs O(vocabulary) per row of a request that still replays, and nothing for the others.
    A request that speculates has a row for each proposed token; each forces the token of its own
    place, so that the replay goes on however many of them are accepted.
    """

    def __init__(self, vllm_config: Any, req_states: Any) -> None:
        super().__init__(vllm_config, req_states)
        self._states = req_states
        self._proposed = vllm_config.num_speculative_tokens
        self._replays: dict[int, _Replay] = {}  # by slot

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Remember the slot's replay, and forget its last occupant's."""
        self._replays.pop(req_idx, None)
        tokens = replay_of(sampling_params)
        if tokens:
            self._replays[req_idx] = _Replay(
                tokens,
                torch.tensor(tokens, device=self._states.device),
                int(self._states.prompt_len.np[req_idx]),
            )
        return bool(tokens)

    def apply(self, logits: torch.Tensor, ctx: Any) -> torch.Tensor:
        """Force rows whose request still replays. `logits` is `[rows, vocab]` float32."""
        if not self._replays:
            return logits
        for request, slot in enumerate(ctx.idx_mapping_np.tolist()):
            replay = self._replays.get(slot)
            if replay is None:
                continue
            output = int(ctx.seq_lens_upper_bound_np[request]) - replay.prompt
            # The host counts proposals of steps under way, at most two, as accepted.
            if output - 2 * self._proposed >= len(replay.tokens):
                del self._replays[slot]
            elif self._proposed:
                _force_rows(logits, replay, slot, self._proposed + 1, ctx)
            elif output >= 0:  # else the prompt goes on: vLLM discards the sampled token
                force_token(logits[request], replay.tokens[output])
        return logits


def _force_rows(logits: torch.Tensor, replay: _Replay, slot: int, most: int, ctx: Any) -> None:
    """Force a request's rows of `logits`, `[rows, vocab]`, in place, as `force_token` does.

    They are at most `most`, side by side. Where they are and what their places are is on the
    device, which nothing waits for. Rows inside the prompt are left as they are.
    """
    is_own = ctx.expanded_idx_mapping == slot
    first = is_own.to(torch.int8).argmax()
    rows = (first + torch.arange(most, device=logits.device)).clamp(max=len(logits) - 1)
    place = ctx.pos[rows] + 1 - replay.prompt
    last = len(replay.tokens) - 1
    forced = (is_own[rows] & (place >= 0) & (place <= last))[:, None]
    tokens = replay.on_device[place.clamp(0, last)][:, None]
    own = logits[rows]
    masked = torch.full_like(own, float("-inf"))
    masked.scatter_(1, tokens, torch.nan_to_num(own.gather(1, tokens), neginf=0.0))
    logits[rows] = torch.where(forced, masked, own)
