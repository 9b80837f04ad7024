"""Decode replays the first token that prefill sampled, by a logits processor.

The decode engine recomputes the last prompt token and samples again; every logit but the
replayed token's is masked, so that penalties, grammars, minimum lengths, stop strings and
the seeded generator count that token as if it had been sampled here.
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

from .params import first_token_of


class ReplayFirstToken(LogitsProcessor):  # type: ignore[misc]
    """For the V1 model runner."""

    def __init__(self, vllm_config: Any, device: torch.device, is_pin_memory: bool) -> None:
        del vllm_config, device, is_pin_memory
        self._rows: dict[int, tuple[int, list[int]]] = {}  # row -> (token, its output so far)

    def is_argmax_invariant(self) -> bool:
        """Replaying changes the greedy choice."""
        return False

    def update_state(self, batch_update: BatchUpdate | None) -> None:
        """Follow requests through the batch; forget those whose first token is out."""
        process_dict_updates(self._rows, batch_update, _replayed)
        for row in [row for row, (_, output) in self._rows.items() if output]:
            del self._rows[row]

    def apply(self, logits: torch.Tensor) -> torch.Tensor:
        """Mask everything but the replayed token, in place. `logits` is `[rows, vocab]`."""
        for row, (token, output) in self._rows.items():
            if not output:
                _force(logits[row], token)
        return logits


def _replayed(
    params: SamplingParams, _prompt: list[int] | None, output: list[int]
) -> tuple[int, list[int]] | None:
    token = first_token_of(params)
    return None if token is None else (token, output)


def _force(row: torch.Tensor, token: int) -> None:
    """Keep the token's own logit for its log-probability, unless a grammar masked it."""
    kept = torch.nan_to_num(row[token], neginf=0.0)
    row.fill_(float("-inf"))
    row[token] = kept
