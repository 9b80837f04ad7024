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
    MambaSpec,
    MLAAttentionSpec,
    SlidingWindowSpec,
    SparseCacheRole,
    UniformTypeKVCacheSpecs,
)

from ...core.errors import UnsupportedModel


def refuse_unreadable_caches(config: VllmConfig, caches: KVCacheConfig) -> None:
    """Raise UnsupportedModel unless every layer's pages hold what can be handed over.

    That is plain keys and values, latents, or a recurrent state at every block's end.

    The last check, before anything is computed.
    """
    model = config.model_config
    reasons = tuple(dict.fromkeys(_cache_reasons(caches)))
    if reasons:
        raise UnsupportedModel(f"{model.model}: {'; '.join(reasons)}")


def _cache_reasons(caches: KVCacheConfig) -> Iterator[str]:
    groups = len(caches.kv_cache_groups)
    specs = [group.kv_cache_spec for group in caches.kv_cache_groups]
    if any(isinstance(spec, MambaSpec) for spec in specs):
        yield from _hybrid_reasons(specs)
        return
    if groups > 1:
        yield f"the layers' KV caches are paged in {groups} groups, and one is handed over"
    for group in caches.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            layers = list(spec.kv_cache_specs.values())
            for layer in layers:
                yield from _layer_reasons(layer)
            if len({(each.num_kv_heads, each.head_size, each.dtype) for each in layers}) > 1:
                yield "layers have keys and values of different widths, and the wire format has one"
        else:
            yield from _layer_reasons(spec)


def _layer_reasons(spec: KVCacheSpec) -> Iterator[str]:
    if type(spec) not in (FullAttentionSpec, SlidingWindowSpec, MLAAttentionSpec):
        yield f"KV caches of kind {type(spec).__name__} cannot be handed over"
        return
    if isinstance(spec, MLAAttentionSpec) and not _is_plain_latent(spec):
        yield "the latents' pages are packed for sparse attention, in a format that is not known"
        return
    fp8_is_bytes = (
        spec.kv_quant_mode is KVQuantMode.FP8_PER_TENSOR and not current_platform.is_cpu()
    )
    if spec.kv_quant_mode is not KVQuantMode.NONE and not fp8_is_bytes:
        yield f"KV caches quantised as {spec.kv_quant_mode.name} cannot be handed over"
    parts = 1 if isinstance(spec, MLAAttentionSpec) else 2  # a latent, or key and value
    width = parts * spec.head_size * spec.dtype.itemsize
    if spec.state_content_size_bytes != width or spec.num_heads != spec.num_kv_heads:
        yield "the KV caches' pages are packed in a format that is not known"


def _hybrid_reasons(specs: list[KVCacheSpec]) -> Iterator[str]:
    """Yield why the groups of a model with recurrent layers cannot be handed over."""
    states = [spec for spec in specs if isinstance(spec, MambaSpec)]
    others = [spec for spec in specs if not isinstance(spec, MambaSpec)]
    if any(spec.mamba_cache_mode != "align" for spec in states):
        yield "recurrent states are handed over in vLLM's mamba_cache_mode align only"
    if len({spec.block_size for spec in specs}) > 1:
        yield "the KV caches' groups have blocks of different sizes"
    if any(spec.num_speculative_blocks for spec in states):
        yield "recurrent states of proposed tokens cannot be handed over"
    if not others:
        yield "no layer has keys and values"
    for spec in others:
        if type(spec) is FullAttentionSpec:
            yield from _layer_reasons(spec)
        else:
            yield f"KV caches of kind {type(spec).__name__} beside recurrent states are not known"


def _is_plain_latent(spec: MLAAttentionSpec) -> bool:
    """Return True for one latent a token, as numbers of the cache's type."""
    plain_type = spec.cache_dtype_str is None or not spec.cache_dtype_str.endswith("_ds_mla")
    uncompressed = spec.tokens_per_state == 1 and spec.model_version is None
    return plain_type and uncompressed and spec.cache_role is SparseCacheRole.SPARSE
