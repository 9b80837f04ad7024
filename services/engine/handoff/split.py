"""The split of the model over this engine's workers, and over those of its peers."""

from __future__ import annotations

from vllm.config import ModelConfig, VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tensor_model_parallel_rank
from vllm.distributed.utils import get_pp_indices

from ...core.types import Span
from ...kv.shards import Split
from .orders import HandoffConfig


def worker_rank(split: Split) -> int:
    """Return this process's rank, as `split` counts them."""
    return int(get_pp_group().rank_in_group * split.tensor + get_tensor_model_parallel_rank())


def own_split(config: VllmConfig) -> Split:
    """Return the split of the engine that runs here."""
    parallel = config.parallel_config
    return _split(
        config.model_config, parallel.tensor_parallel_size, parallel.pipeline_parallel_size
    )


def peer_split(config: VllmConfig, handoff: HandoffConfig) -> Split:
    """Return the split of the same model at the other end of the hand-off."""
    return _split(
        config.model_config,
        handoff.peer_tensor_parallel_size,
        handoff.peer_pipeline_parallel_size,
    )


def _split(model: ModelConfig, tensor: int, pipeline: int) -> Split:
    layers = model.get_total_num_hidden_layers()
    stages = tuple(Span(*get_pp_indices(layers, stage, pipeline)) for stage in range(pipeline))
    # Every rank holds the latents of MLA layers whole, like one head that all of them share.
    heads = 1 if model.use_mla else model.get_total_num_kv_heads()
    return Split(heads, tensor, stages)
