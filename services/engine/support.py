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

# Hybrids whose answers at original positions, and after a hand-over, were compared with
# transformers' on engines.
_COMPARED_HYBRIDS = ("granitemoehybrid",)
_UNCOMPARED = "its recurrent layers were not compared with transformers' yet"
# Key and value side by side, a number each, of this very type.
_PLAIN_CACHES = ("auto", "float16", "bfloat16")
_FP8_CACHES = ("fp8", "fp8_e4m3", "fp8_e5m2")
_SPECULATION = ("ngram", "ngram_gpu")  # proposals from tokens alone, without KV of their own
_ATTENTION_LAYERS = ("attention", "full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """An engine's options, as far as positions and KV depend on them."""

    cache_dtype: str
    speculative: str | None  # the method
    decode_context_parallel: int
    prefill_context_parallel: int
    fast_prefill: bool
    on_cpu: bool
    prefix_caching: bool
    tensor_parallel: int
    pipeline_parallel: int
    peer_tensor_parallel: int  # of the engines at the other end of the hand-off
    peer_pipeline_parallel: int

    @classmethod
    def of_arguments(cls, args: AsyncEngineArgs, model: ModelConfig) -> EngineOptions:
        """Read the options from an engine's arguments, from which vLLM has made `model`."""
        return cls(
            resolve_kv_cache_dtype_string(args.kv_cache_dtype, model),
            None if args.speculative_config is None else args.speculative_config.get("method"),
            args.decode_context_parallel_size,
            args.prefill_context_parallel_size,
            args.kv_sharing_fast_prefill,
            current_platform.is_cpu(),
            args.enable_prefix_caching is not False,
            args.tensor_parallel_size,
            args.pipeline_parallel_size,
            args.tensor_parallel_size,
            args.pipeline_parallel_size,
        )

    @classmethod
    def of_config(cls, config: VllmConfig) -> EngineOptions:
        """Read the options from vLLM's whole configuration."""
        parallel, transfer = config.parallel_config, config.kv_transfer_config
        peer = {} if transfer is None else transfer.kv_connector_extra_config
        tensor, pipeline = parallel.tensor_parallel_size, parallel.pipeline_parallel_size
        return cls(
            config.cache_config.cache_dtype,
            None if config.speculative_config is None else config.speculative_config.method,
            parallel.decode_context_parallel_size,
            parallel.prefill_context_parallel_size,
            config.cache_config.kv_sharing_fast_prefill,
            current_platform.is_cpu(),
            bool(config.cache_config.enable_prefix_caching),
            tensor,
            pipeline,
            peer.get("peer_tensor_parallel_size", tensor),
            peer.get("peer_pipeline_parallel_size", pipeline),
        )

    def with_peer(self, peer: EngineConfig) -> EngineOptions:
        """Return these options beside an engine at the other end of the hand-off."""
        return replace(
            self,
            peer_tensor_parallel=peer.tensor_parallel_size,
            peer_pipeline_parallel=peer.pipeline_parallel_size,
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
    handoff, notes = tuple(_handoff_reasons(model)), tuple(_notes(model))
    for mode, reasons in (
        (Mode.REFUSED, _refused_reasons(model, options)),
        (Mode.TEXT, tuple(_position_reasons(model))),
        (Mode.WINDOWED, tuple(_window_reasons(model))),
    ):
        if reasons:
            return Support(mode, reasons, handoff, notes)
    return Support(Mode.EXACT, (), handoff, notes)


def _refused_reasons(model: ModelConfig, options: EngineOptions) -> tuple[str, ...]:
    hybrid = tuple(_hybrid_options(options)) if _is_compared_hybrid(model) else ()
    return (*_refusals(model), *_refused_options(options), *hybrid)


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
    if model.using_transformers_backend() and has_recurrent_layers(model):
        yield "vLLM's backend for transformers' models does not run recurrent layers"


def _position_reasons(model: ModelConfig) -> Iterator[str]:
    """Yield why kept tokens would not attend as they do at their original positions."""
    if model.is_attention_free:
        yield "no layer has positions to keep: all are recurrent"
    elif model.is_hybrid and not _is_compared_hybrid(model):
        yield _UNCOMPARED
    if has_sparse_indexer(model):
        yield "a sparse indexer chooses among all tokens of the prompt, from a cache of its own"
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
    if has_sparse_indexer(model):
        yield "the sparse indexer's cache is packed in a format that the wire format does not have"
    if model.is_attention_free:
        yield "no layer keeps keys and values, which the wire format needs"
    elif model.is_hybrid and not _is_compared_hybrid(model):
        yield _UNCOMPARED
    if getattr(model.hf_text_config, "num_kv_shared_layers", 0):
        yield "layers that share the keys and values of others are not in the wire format"
    if has_unequal_layers(model):
        yield "layers have keys and values of different widths, and the wire format has one"


def _hybrid_options(options: EngineOptions) -> Iterator[str]:
    """Yield what a model with recurrent layers needs of an engine, and this one has not."""
    if not options.prefix_caching:
        yield "recurrent states are handed over from the prefix cache: enable_prefix_caching"
    own = (options.tensor_parallel, options.pipeline_parallel)
    if own != (options.peer_tensor_parallel, options.peer_pipeline_parallel):
        yield "recurrent states cannot be split: prefill and decode need equal tensor_parallel_size"
    if options.pipeline_parallel > 1:
        yield "recurrent states of pipeline stages cannot be handed over"


def _is_compared_hybrid(model: ModelConfig) -> bool:
    return model.is_hybrid and model.hf_text_config.model_type in _COMPARED_HYBRIDS


def _notes(model: ModelConfig) -> Iterator[str]:
    """Yield what pruning means for the model."""
    if _is_compared_hybrid(model):
        yield (
            "recurrent layers read the kept tokens in order, as if nothing lay between them; "
            "the decode engine computes the part of a prompt after its last whole cache block"
        )


def _refused_options(options: EngineOptions) -> Iterator[str]:
    readable = _PLAIN_CACHES if options.on_cpu else (*_PLAIN_CACHES, *_FP8_CACHES)
    if options.cache_dtype not in readable:
        yield (
            f"KV caches of dtype {options.cache_dtype} cannot be handed over: "
            f"kv_cache_dtype may be {', '.join(readable)}"
        )
    if options.speculative not in (None, *_SPECULATION):
        yield f"speculative decoding by {options.speculative} does not know sparse positions"
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


def has_sparse_indexer(model: ModelConfig) -> bool:
    """Return True if layers attend to tokens that an indexer chooses: DeepSeek-V3.2, V4, GLM-5."""
    return getattr(model.hf_text_config, "index_topk", None) is not None


def has_unequal_layers(model: ModelConfig) -> bool:
    """Return True if some layers have heads of another size or number, as Gemma 4's do."""
    layers = model.hf_text_config.to_dict().get("per_layer_config") or {}
    return any({"head_dim", "num_key_value_heads"} & {*layer} for layer in layers.values())


def brings_model_state(model: ModelConfig) -> bool:
    """Return True if vLLM's V2 runner would ask the model's class for its own model state."""
    model_class, _ = model.registry.resolve_model_cls(model.architectures, model)
    return hasattr(model_class, "get_model_state_cls")
