"""KV caches that cannot be handed over, found once vLLM has built the model and chosen them.

What configurations show is refused earlier, by `engine/support.py`.
"""

from __future__ import annotations

from collections.abc import Iterator

from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from ...core.errors import UnsupportedModel


def refuse_unreadable_caches(config: VllmConfig, caches: KVCacheConfig) -> None:
    """Raise UnsupportedModel unless every layer's pages hold plain keys and values.

    The last check, before anything is computed.
    """
    model = config.model_config
    reasons = tuple(dict.fromkeys(_cache_reasons(caches)))
    if reasons:
        raise UnsupportedModel(f"{model.model}: {'; '.join(reasons)}")


def _cache_reasons(caches: KVCacheConfig) -> Iterator[str]:
    groups = len(caches.kv_cache_groups)
    if groups > 1:
        yield f"the layers' KV caches are paged in {groups} groups, and one is handed over"
    for group in caches.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            for layer in spec.kv_cache_specs.values():
                yield from _layer_reasons(layer)
        else:
            yield from _layer_reasons(spec)


def _layer_reasons(spec: KVCacheSpec) -> Iterator[str]:
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
        yield f"KV caches of kind {type(spec).__name__} cannot be handed over"
        return
    fp8_is_bytes = (
        spec.kv_quant_mode is KVQuantMode.FP8_PER_TENSOR and not current_platform.is_cpu()
    )
    if spec.kv_quant_mode is not KVQuantMode.NONE and not fp8_is_bytes:
        yield f"KV caches quantised as {spec.kv_quant_mode.name} cannot be handed over"
    width = 2 * spec.head_size * spec.dtype.itemsize
    if spec.state_content_size_bytes != width or spec.num_heads != spec.num_kv_heads:
        yield "the KV caches' pages are packed in a format that is not known"
