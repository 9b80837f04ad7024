"""The support of a main model in an engine, found from their configurations alone.

An engine refuses at its start, before any weights are loaded, what is not served; `specprefill
check` and `doctor` report it from the model's folder, in the same words.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import transformers
from pydantic import ValidationError
from vllm.config import ModelConfig, VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from ..config import EngineConfig, MainModel
from ..core.errors import UnsupportedModel
from ..core.model_modes import Mode, Support
from .args import plain_args

# The modes in which engines serve; a model of another one is refused.
SERVED_MODES = frozenset({Mode.EXACT, Mode.WINDOWED, Mode.TEXT, Mode.DENSE})

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
    """Raise UnsupportedModel for a model that no mode in service fits."""
    support = support_of_config(config)
    if not is_served(support):
        raise UnsupportedModel(refusal(config.model_config.model, support))


def is_served(support: Support) -> bool:
    """Return True for a model that engines start with."""
    return support.mode in SERVED_MODES


def refusal(model: str, support: Support) -> str:
    """Return the sentence that an engine, `check` and `doctor` print about a refused model."""
    return f"{model}: {'; '.join(support.reasons)}"


def engine_support(model: MainModel, engine: EngineConfig) -> Support:
    """Return the support of a deployment's main model in one of its engines.

    From the model's folder alone: no weights are read and no GPU is needed. If vLLM
    rejects the folder, its message is the reason.
    """
    try:
        args = plain_args(model, engine)
        found = args.create_model_config()
    except TypeError as error:  # a name that AsyncEngineArgs does not have
        return _refused(f"engine_args: {str(error).rpartition('__init__() ')[2]}")
    except ValidationError as error:
        return _refused(*(f"vLLM refuses it: {each['msg']}" for each in error.errors()))
    except (ValueError, OSError) as error:
        return _refused(f"vLLM refuses it: {error}")
    return support_of(found, EngineOptions.of_arguments(args, found))


def model_config(model: MainModel, engine: EngineConfig) -> ModelConfig | None:
    """Return vLLM's configuration of the model; None where vLLM refuses it."""
    try:
        return plain_args(model, engine).create_model_config()
    except (TypeError, ValueError, OSError):
        return None


def support_of_config(config: VllmConfig) -> Support:
    """Return the support of the model that an engine is about to load."""
    return support_of(config.model_config, EngineOptions.of_config(config))


def hands_over(model: MainModel, *engines: EngineConfig) -> bool:
    """Return True if each of the engines can hand the model's KV over, or take it over."""
    return all(engine_support(model, engine).hands_over for engine in engines)


def support_elsewhere(model: ModelConfig, deployed: MainModel, *engines: EngineConfig) -> Support:
    """Return the support in engines of other machines, which may have GPUs.

    KV is handed over if each of them can.
    """
    found = []
    for engine in engines:
        options = EngineOptions.of_arguments(plain_args(deployed, engine), model)
        found.append(support_of(model, replace(options, on_cpu=False)))
    reasons = dict.fromkeys(reason for each in found for reason in each.handoff_reasons)
    return replace(found[0], handoff_reasons=tuple(reasons))


def support_of(model: ModelConfig, options: EngineOptions) -> Support:
    """Return the best mode for `model` in an engine with these options."""
    handoff = tuple(_handoff_reasons(model))
    for mode, reasons in (
        (Mode.REFUSED, (*_refusals(model), *_refused_options(options))),
        (Mode.TEXT, tuple(_position_reasons(model))),
        (Mode.WINDOWED, tuple(_window_reasons(model))),
    ):
        if reasons:
            return Support(mode, reasons, handoff)
    return Support(Mode.EXACT, (), handoff)


def _refused(*reasons: str) -> Support:
    return Support(Mode.REFUSED, reasons)


def _refusals(model: ModelConfig) -> Iterator[str]:
    """Yield why no mode fits the model, whatever an engine's options."""
    if model.is_encoder_decoder:
        yield "encoder-decoder models have two prompts"
    if model.runner_type != "generate":
        yield "the model writes no text"
    elif model.is_diffusion:
        yield "a diffusion model does not write token after token"


def _position_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield why kept tokens would not attend as they do at their original positions."""
    if model.use_mla:
        yield "MLA caches are not mapped to sparse positions"
    if has_recurrent_layers(model):
        yield "recurrent layers have no positions to keep"
    if model.uses_alibi:
        yield "ALiBi biases count cache slots, not positions"
    if getattr(model.hf_text_config, "dual_chunk_attention_config", None) is not None:
        yield "dual chunk attention counts cache slots, not positions"
    if getattr(model.hf_config, "rswa_window", None) is not None:
        yield "a reference sliding window counts cache slots, not positions"
    if model.runner_type == "generate" and brings_model_state(model):
        yield "the model brings a state of its own, whose inputs may depend on positions"


def _window_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield windows that may bind; one as long as the longest prompt never does."""
    length = model.max_model_len
    window, chunk = model.get_sliding_window(), model.attention_chunk_size
    if window is not None and window < length:
        yield f"a sliding window ({window}, max_model_len {length}) counts kept tokens"
    if chunk is not None and chunk < length:
        yield f"chunked attention (chunks of {chunk}, max_model_len {length}) counts kept tokens"


def _handoff_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield why a decode engine cannot take over the model's KV."""
    if model.use_mla:
        yield "MLA caches hold latents, which the wire format does not have"
    if has_recurrent_layers(model):
        yield "recurrent layers keep a state, which the wire format does not have"


def _refused_options(options: EngineOptions) -> Iterator[str]:
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
