"""Makes a V1 model runner propose from whole prompts.

vLLM's proposer, and with it numba, is imported only where it is used: at the start of an engine in
a process that has numba already, vLLM's search for Triton kernels fails on one of numba's objects.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from vllm.config import VllmConfig
from vllm.v1.spec_decode.metadata import SpecDecodeMetadata

from ..sparse.replay import ReplayTokens
from ..vllm_internals import (
    check_expanded_parameters,
    check_v1_speculation,
    take_every_logits_processor,
)


class DraftingRunner(Protocol):
    """A V1 model runner of an engine that speculates."""

    vllm_config: VllmConfig
    device: torch.device
    drafter: Any
    input_batch: Any
    requests: dict[str, Any]
    num_spec_tokens: int
    effective_drafter_max_model_len: int


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
        from .proposer_v1 import PromptProposer

        runner.drafter = PromptProposer(runner)


def drafts_or_none(metadata: SpecDecodeMetadata | None) -> SpecDecodeMetadata | None:
    """Return None for a step that checks no proposed token: it is sampled as any other.

    vLLM's rejection sampler fails on no tokens, on CPUs, where a request asks for `top_k`.
    """
    return metadata if metadata is not None and any(metadata.num_draft_tokens) else None
