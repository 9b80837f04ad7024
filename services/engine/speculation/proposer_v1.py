"""vLLM's n-gram proposer over whole prompts, for the V1 model runner.

The search is vLLM's (prompt lookup: the longest n-gram of `prompt_lookup_min` to
`prompt_lookup_max` tokens that ends the text and occurs before is continued), linear in the
history's length at each step. What it searches is not the engine's own tokens.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

from .history import TokenHistories, in_batch_order
from .runner_v1 import DraftingRunner


class PromptProposer(NgramProposer):  # type: ignore[misc]
    """Proposes what follows the answer's last tokens elsewhere in the whole prompt or answer."""

    def __init__(self, runner: DraftingRunner) -> None:
        config = runner.vllm_config
        self._runner = runner
        self._histories = TokenHistories(
            config.scheduler_config.max_num_seqs, config.model_config.max_model_len
        )
        super().__init__(config)
        self._compile()

    def propose(
        self,
        num_speculative_tokens: int,
        sampled_token_ids: list[list[int]],
        num_tokens_no_spec: NDArray[np.int32],
        token_ids_cpu: NDArray[np.int32],
        slot_mappings: Any = None,
    ) -> list[list[int]]:
        """Return each request's proposal, in the batch's order; empty for none.

        `token_ids_cpu` is `[requests, longest]` and `num_tokens_no_spec` `[requests]`: the
        engine's tokens, the sampled ones included. Requests that sampled nothing get nothing.
        """
        del slot_mappings
        if not any(sampled_token_ids):
            return [[] for _ in sampled_token_ids]
        batch, histories = self._runner.input_batch, self._histories
        histories.forget_all_but(batch.req_id_to_index)
        rows: dict[int, int] = {}
        for index, sampled in enumerate(sampled_token_ids):
            if not sampled:
                continue
            request = self._runner.requests[batch.req_ids[index]]
            row = histories.update(
                request.req_id,
                request.sampling_params,
                request.num_prompt_tokens,
                token_ids_cpu[index, : num_tokens_no_spec[index]],
            )
            if row is not None and histories.lengths[row] < self.max_model_len:
                rows[row] = index
        proposals = self.batch_propose(
            len(histories.lengths),
            list(rows),
            histories.lengths,
            histories.tokens,
            num_speculative_tokens,
        )
        return in_batch_order(proposals, rows, len(sampled_token_ids))

    def _compile(self) -> None:
        """Compile the search before the first request needs it: vLLM's warm-up is empty."""
        histories = self._histories
        rows = len(histories.lengths)
        self.batch_propose(rows, [0], histories.lengths, histories.tokens, self.k)
