"""vLLM's n-gram proposer over whole prompts, for the V1 model runner.

The search is vLLM's (prompt lookup: the longest n-gram of `prompt_lookup_min` to
`prompt_lookup_max` tokens that ends the text and occurs before is continued), linear in the
history's length at each step. What it searches is not the engine's own tokens.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.config import VllmConfig
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata
from vllm.v1.spec_decode.ngram_proposer import NgramProposer

from ..sparse.replay import ReplayTokens
from ..vllm_internals import (
    check_expanded_parameters,
    check_v1_speculation,
    take_every_logits_processor,
)
from .history import TokenHistories, in_batch_order


class DraftingRunner(Protocol):
    """A V1 model runner of an engine that speculates."""

    vllm_config: VllmConfig
    device: torch.device
    drafter: Any
    input_batch: Any
    requests: dict[str, Any]
    num_spec_tokens: int
    effective_drafter_max_model_len: int


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


def speculate_from_prompts(runner: DraftingRunner) -> None:
    """Replace the proposer that vLLM has made for `runner`, if any.

    Rows without proposals are sampled with every logits processor, among them the replay;
    requests that need more than vLLM's own get no proposals.
    """
    if runner.vllm_config.speculative_config is None:
        return
    check_v1_speculation(type(runner))
    check_expanded_parameters(runner.device)
    take_every_logits_processor(runner, ReplayTokens)
    # The proposer keeps to the longest length itself; beyond it vLLM proposes token 0 to all.
    runner.effective_drafter_max_model_len += runner.num_spec_tokens
    if hasattr(runner, "drafter"):  # the last pipeline stage
        runner.drafter = PromptProposer(runner)


def drafts_or_none(metadata: SpecDecodeMetadata | None) -> SpecDecodeMetadata | None:
    """Return None for a step that checks no proposed token: it is sampled as any other.

    vLLM's rejection sampler fails on no tokens, on CPUs, where a request asks for `top_k`.
    """
    return metadata if metadata is not None and any(metadata.num_draft_tokens) else None
