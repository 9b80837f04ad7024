"""Teaches one attention head to look at what an answer needs.

The speculator is judged by where it looks, so it is taught that too: from an answer's first tokens
the last head of its last layer is to look at all of the gold alike.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from curriculum import TrainingBatch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb


def finding_loss(model: LlamaForCausalLM, hidden: Tensor, batch: TrainingBatch) -> Tensor:
    """Return the cross-entropy of the head's attention over the prompt to an even look at the gold.

    `hidden` [sample, token, hidden] is the last layer reads. Zero where nothing is to be found.
    """
    losses = list(_losses(*_queries_and_keys(model, hidden, batch), batch))
    return torch.stack(losses).mean() if losses else hidden.new_zeros(())


def _queries_and_keys(
    model: LlamaForCausalLM, hidden: Tensor, batch: TrainingBatch
) -> tuple[Tensor, Tensor]:
    """Return the head's queries and keys, scaled: [sample, token, head_dim] each."""
    layer, size = model.model.layers[-1], model.config.head_dim
    normed = layer.input_layernorm(hidden)
    query = normed @ layer.self_attn.q_proj.weight[-size:].T
    key = normed @ layer.self_attn.k_proj.weight[-size:].T
    cos, sin = model.model.rotary_emb(hidden, batch.positions.to(hidden.device))
    query, key = apply_rotary_pos_emb(query.unsqueeze(1), key.unsqueeze(1), cos, sin)
    return query.squeeze(1) * layer.self_attn.scaling, key.squeeze(1)


def _losses(queries: Tensor, keys: Tensor, batch: TrainingBatch) -> Iterator[Tensor]:
    """Return a loss for each answer; tokens behind its start token are no keys."""
    for row, findings in enumerate(batch.findings):
        for finding in findings:
            asked = queries[row, finding.queries.start : finding.queries.stop]
            logits = (asked @ keys[row, : finding.queries.start + 1].T).float()
            yield -logits.log_softmax(dim=-1)[:, list(finding.gold)].mean()
