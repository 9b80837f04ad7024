"""What cannot run at sparse positions, refused at start-up with the reason."""

from __future__ import annotations

from collections.abc import Iterator

from vllm.config import ModelConfig, VllmConfig

from ..errors import UnsupportedModel


def refuse_unsupported(config: VllmConfig) -> None:
    """Raise UnsupportedModel when the engine would compute wrong positions or KV."""
    reasons = list(_reasons(config))
    if reasons:
        raise UnsupportedModel(f"{config.model_config.model}: {'; '.join(reasons)}")


def _reasons(config: VllmConfig) -> Iterator[str]:
    yield from model_reasons(config.model_config)
    if config.speculative_config is not None:
        yield "speculative decoding does not know sparse positions"
    if config.parallel_config.decode_context_parallel_size > 1:
        yield "decode context parallelism splits the cache by slot"


def model_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield why a model cannot run at sparse positions, from its configuration alone."""
    if model.uses_mrope:
        yield "multimodal rope has several positions per token"
    if model.use_mla:
        yield "MLA caches are not mapped to sparse positions"
    if model.is_hybrid or model.is_attention_free:
        yield "recurrent layers have no positions to keep"
    if model.is_encoder_decoder:
        yield "encoder-decoder models have two prompts"
    if model.get_sliding_window() is not None:
        yield "a sliding window counts cache slots, not positions"
    if getattr(model.hf_text_config, "alibi", False):
        yield "ALiBi biases count cache slots, not positions"
