"""Models and options that cannot run at sparse positions, found from the configuration alone.

An engine refuses it at start, before any weights are loaded; `specprefill check` and `doctor`
report it from the model's folder, in the same words. The KV caches' own formats are known only
once vLLM has built the model: `refuse_unreadable_caches` looks at those.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import transformers
from pydantic import ValidationError
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheSpec,
    KVQuantMode,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from ...config import EngineConfig, MainModel
from ...core.errors import UnsupportedModel
from ..args import plain_args

# Key and value side by side, a number each, of this very type.
_PLAIN_CACHES = ("auto", "float16", "bfloat16")
_FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
_ATTENTION_LAYERS = ("attention", "full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """An engine's options, as far as positions and KV depend on them."""

    cache_dtype: str
    speculative: bool
    decode_context_parallel: int
    prefill_context_parallel: int
    fast_prefill: bool
    on_cpu: bool

    @classmethod
    def of_arguments(cls, args: AsyncEngineArgs, model: ModelConfig) -> EngineOptions:
        """Read the options from an engine's arguments, from which vLLM has made `model`."""
        return cls(
            resolve_kv_cache_dtype_string(args.kv_cache_dtype, model),
            args.speculative_config is not None,
            args.decode_context_parallel_size,
            args.prefill_context_parallel_size,
            args.kv_sharing_fast_prefill,
            current_platform.is_cpu(),
        )

    @classmethod
    def of_config(cls, config: VllmConfig) -> EngineOptions:
        """Read the options from vLLM's whole configuration."""
        return cls(
            config.cache_config.cache_dtype,
            config.speculative_config is not None,
            config.parallel_config.decode_context_parallel_size,
            config.parallel_config.prefill_context_parallel_size,
            config.cache_config.kv_sharing_fast_prefill,
            current_platform.is_cpu(),
        )


def refuse_unsupported(config: VllmConfig) -> None:
    """Raise UnsupportedModel when the engine would compute wrong positions or KV."""
    reasons = unsupported_reasons(config.model_config, EngineOptions.of_config(config))
    if reasons:
        raise UnsupportedModel(refusal(config.model_config.model, reasons))


def refusal(model: str, reasons: tuple[str, ...]) -> str:
    """Return the sentence that an engine, `check` and `doctor` print."""
    return f"{model}: {'; '.join(reasons)}"


def engine_reasons(model: MainModel, engine: EngineConfig) -> tuple[str, ...]:
    """Return why this deployment's engine would refuse to start; empty when it would not.

    From the model's folder alone: no weights are read and no GPU is needed. If vLLM
    rejects the folder, its message is the reason.
    """
    try:
        args = plain_args(model, engine)
        found = args.create_model_config()
    except TypeError as error:  # a name that AsyncEngineArgs does not have
        return (f"engine_args: {str(error).rpartition('__init__() ')[2]}",)
    except ValidationError as error:
        return tuple(f"vLLM refuses it: {each['msg']}" for each in error.errors())
    except (ValueError, OSError) as error:
        return (f"vLLM refuses it: {error}",)
    return unsupported_reasons(found, EngineOptions.of_arguments(args, found))


def unsupported_reasons(model: ModelConfig, options: EngineOptions) -> tuple[str, ...]:
    """Return why an engine cannot serve `model` at sparse positions; empty when it can."""
    return (
        *model_reasons(model),
        *_option_reasons(options),
    )


def model_reasons(model: ModelConfig) -> tuple[str, ...]:
    """Return the reasons that lie in the model alone, whatever an engine's options."""
    return (*_position_reasons(model), *_window_reasons(model), *_class_reasons(model))


def _position_reasons(model: ModelConfig) -> Iterator[str]:
    if model.uses_mrope:
        yield "multimodal rope has several positions per token"
    if model.use_mla:
        yield "MLA caches are not mapped to sparse positions"
    if has_recurrent_layers(model):
        yield "recurrent layers have no positions to keep"
    if model.is_encoder_decoder:
        yield "encoder-decoder models have two prompts"
    if model.uses_alibi:
        yield "ALiBi biases count cache slots, not positions"
    if getattr(model.hf_text_config, "dual_chunk_attention_config", None) is not None:
        yield "dual chunk attention counts cache slots, not positions"


def _window_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield windows that may bind; one as long as the longest prompt never does."""
    length = model.max_model_len
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    if window is not None and window < length:
        yield (
            f"a sliding window ({window}, max_model_len {length}) counts cache slots, not positions"
        )
    if chunk is not None and chunk < length:
        yield (
            f"chunked attention (chunks of {chunk}, max_model_len {length}) counts cache slots, "
            "not positions"
        )
    if getattr(model.hf_config, "rswa_window", None) is not None:
        yield "a reference sliding window counts cache slots, not positions"


def _class_reasons(model: ModelConfig) -> Iterator[str]:
    if model.runner_type != "generate":
        yield "the model writes no text"
    elif model.is_diffusion:
        yield "a diffusion model does not write token after token"
    elif brings_model_state(model):
        yield "the model brings a state of its own, whose inputs may depend on positions"


def _option_reasons(options: EngineOptions) -> Iterator[str]:
    readable = _PLAIN_CACHES if options.on_cpu else (*_PLAIN_CACHES, *_FP8_CACHES)
    if options.cache_dtype not in readable:
        yield (
            f"KV caches of dtype {options.cache_dtype} cannot be handed over: "
            f"kv_cache_dtype may be {', '.join(readable)}"
        )
    if options.speculative:
        yield "speculative decoding does not know sparse positions"
    if options.decode_context_parallel > 1:
        yield "decode context parallelism splits the cache by slot"
    if options.prefill_context_parallel > 1:
        yield "prefill context parallelism splits the prompt by slot"
    if options.fast_prefill:
        yield "kv_sharing_fast_prefill skips layers of the prompt whose KV is handed over"


def has_recurrent_layers(model: ModelConfig) -> bool:
    """Return True if some layer keeps a state instead of keys and values.

    vLLM's own flags describe the class that it runs. Where that is its generic backend for
    transformers' models, which has none of these flags, transformers' are read.
    """
    if model.is_hybrid or model.is_attention_free:
        return True
    if not model.using_transformers_backend():
        return False
    layers = getattr(model.hf_text_config, "layer_types", None)
    if layers is not None:
        return any(layer not in _ATTENTION_LAYERS for layer in layers)
    wrapped = getattr(transformers, model.architectures[0], None)
    return bool(getattr(wrapped, "_is_stateful", False))


def brings_model_state(model: ModelConfig) -> bool:
    """Return True if vLLM's V2 runner would ask the model's class for its own model state."""
    model_class, _ = model.registry.resolve_model_cls(model.architectures, model)
    return hasattr(model_class, "get_model_state_cls")


def refuse_unreadable_caches(config: VllmConfig, caches: KVCacheConfig) -> None:
    """Raise UnsupportedModel unless every layer's pages hold plain keys and values.

    The last check, beyond what configurations show: vLLM has built the model and chosen its
    caches, and nothing has been computed.
    """
    model = config.model_config
    reasons = tuple(dict.fromkeys(_cache_reasons(caches, model.max_model_len)))
    if reasons:
        raise UnsupportedModel(refusal(model.model, reasons))


def _cache_reasons(caches: KVCacheConfig, length: int) -> Iterator[str]:
    groups = len(caches.kv_cache_groups)
    if groups > 1:
        yield f"the layers' KV caches are paged in {groups} groups, and one is handed over"
    for group in caches.kv_cache_groups:
        spec = group.kv_cache_spec
        if isinstance(spec, UniformTypeKVCacheSpecs):
            for layer in spec.kv_cache_specs.values():
                yield from _layer_reasons(layer, length)
        else:
            yield from _layer_reasons(spec, length)


def _layer_reasons(spec: KVCacheSpec, length: int) -> Iterator[str]:
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
    chunk = spec.attention_chunk_size if isinstance(spec, FullAttentionSpec) else None
    for reach in (spec.sliding_window, chunk):
        if reach is not None and reach < length:
            yield f"a layer attends to {reach} cache slots of at most {length}"
