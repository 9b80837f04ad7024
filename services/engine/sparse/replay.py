"""Decode repeats tokens that were sampled before, by a logits processor.

The decode engine recomputes the last prompt token and samples again, but every logit except
the replayed token's is masked, until the replay is used up. So penalties, grammars, minimum
lengths, stop strings and the seeded generator count these tokens as if sampled here. One
token is replayed after a prefill elsewhere; all tokens so far, after a decode engine was lost.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import (
    BatchUpdate,
    LogitsProcessor,
    process_dict_updates,
)

from ..params import replay_of


class ReplayTokens(LogitsProcessor):  # type: ignore[misc]
    """The replay processor for the V1 model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._rows: dict[int, tuple[list[int], list[int]]] = {}  # row -> (replay, output so far)

    def is_argmax_invariant(self) -> bool:
        """Return False: replaying changes the greedy choice."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch; forget those whose replay is over."""
        process_dict_updates(self._rows, batch_update, _replay_state)
        over = [row for row, (replay, output) in self._rows.items() if len(output) >= len(replay)]
        for row in over:
            del self._rows[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask everything but the next replayed token, in place. `logits` is `[rows, vocab]`."""
        for row, (replay, output) in self._rows.items():
            if len(output) < len(replay):
                force_token(logits[row], replay[len(output)])
        return logits


def _replay_state(
    params: SamplingParams, _prompt: list[int] | None, output: list[int]
) -> tuple[list[int], list[int]] | None:
    replay = replay_of(params)
    return (replay, output) if replay else None


def force_token(row: torch.Tensor, token: int) -> None:
    """Mask every logit of `row`, `[vocab]`, but the token's, in place.

    The token's own logit stays, for its log-probability, unless a grammar masked it.
    """
    kept = torch.nan_to_num(row[token], neginf=0.0)
    row.fill_(float("-inf"))
    row[token] = kept
