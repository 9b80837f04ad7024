"""Loads the draft model, and refuses one whose attention would be scored wrongly."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..config import SpeculatorConfig, local_path
from ..core.errors import UnsupportedModel
from . import attention
from .llama import Llama
from .reading import DraftKvLayout, Reading

LENGTH_DEPENDENT_ROPE = ("dynamic", "longrope")  # a chunk's keys would depend on what follows
# The names of a model's number of positions.
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "model_max_length")
PROBE_TOKENS = 24
PROBE_CHUNK = 16
PROBE_WINDOW = 6


@dataclass(frozen=True, slots=True)
class Draft:
    """A causal language model that scores prompts."""

    model: PreTrainedModel
    layout: DraftKvLayout
    eos_ids: frozenset[int]
    vocabulary_size: int
    max_positions: int | None  # None: no limit is configured
    quick: Llama | None = None  # the same model without its modules, where its shape is known

    def up_to(self, layer: int) -> Draft:
        """Return the draft without the layers behind `layer`, whose keys nobody asks for.

        It reads prompts; it cannot look ahead.
        """
        quick = None if self.quick is None else self.quick.up_to(layer)
        return replace(self, layout=self.layout.up_to(layer), quick=quick)


def load_draft(config: SpeculatorConfig) -> Draft:
    """Load the configured model, ready to score. Raises UnsupportedModel with a reason."""
    attention.register()
    model_config = read_config(config.path, config.revision)
    refuse_unsupported_cache(model_config)
    with refused_as_unsupported(config.path):
        model = _build(local_path(config.path), model_config, config)
    return as_draft(model.to(_device(config.device)).eval())


def read_config(path: str, revision: str | None = None) -> PreTrainedConfig:
    """Read a model's configuration. Raises UnsupportedModel with a reason. Runs no code of it."""
    with refused_as_unsupported(path):
        config: PreTrainedConfig = AutoConfig.from_pretrained(
            local_path(path), revision=revision, trust_remote_code=False
        )
    return config


@contextmanager
def refused_as_unsupported(path: str) -> Iterator[None]:
    """Turn transformers' refusals to load something from `path` into UnsupportedModel."""
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        if "trust_remote_code" in str(error):
            reason = "it brings code of its own, which is not run here"
        raise UnsupportedModel(f"speculator: {path} cannot be loaded: {reason}") from error


def as_draft(model: PreTrainedModel) -> Draft:
    """Switch a loaded model to the recording attention. Raises UnsupportedModel with a reason."""
    attention.register()
    refuse_unsupported_cache(model.config)
    layout = refuse_unfaithful_attention(model)
    text = model.config.get_text_config(decoder=True)
    return Draft(
        model=model,
        layout=layout,
        eos_ids=_eos_ids(model),
        vocabulary_size=text.vocab_size,
        max_positions=max_positions(text),
        quick=Llama.from_model(model),
    )


def max_positions(text: PreTrainedConfig) -> int | None:
    """Return a text model's number of positions, under whichever name; None: no limit.

    transformers maps most names to `max_position_embeddings`; some models have one of their own.
    """
    settings = text.to_dict()
    names = [text.attribute_map.get(_POSITIONS[0], _POSITIONS[0]), *_POSITIONS]
    found = (settings.get(name) for name in names)
    return next((limit for limit in found if isinstance(limit, int) and limit > 0), None)


def refuse_unsupported_cache(config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel unless every layer is attention, and some see the whole prompt."""
    text = config.get_text_config(decoder=True)
    if config.is_encoder_decoder:
        raise UnsupportedModel(f"speculator: {config.model_type} is an encoder-decoder model")
    kinds = [type(layer) for layer in _cache_layers(config)]
    for index, kind in enumerate(kinds):
        if kind not in (DynamicLayer, DynamicSlidingWindowLayer) or _is_chunked(text, index):
            raise UnsupportedModel(
                f"speculator: layer {index} of {text.model_type} is neither full nor "
                "sliding-window attention (chunked and recurrent layers are not supported)"
            )
    if kinds and DynamicLayer not in kinds and not _windows_never_bind(text):
        raise UnsupportedModel(
            f"speculator: every layer of {text.model_type} sees a window of the prompt "
            f"({text.sliding_window} tokens); some must see all of it"
        )
    rope_type = (text.to_dict().get("rope_parameters") or {}).get("rope_type")
    if rope_type in LENGTH_DEPENDENT_ROPE:
        raise UnsupportedModel(f"speculator: rope type {rope_type!r} changes with prompt length")


def _cache_layers(config: PreTrainedConfig) -> Sequence[Any]:
    try:
        layers: Sequence[Any] = DynamicCache(config=config).layers
    except (KeyError, AttributeError) as error:  # a kind of layer that transformers does not name
        raise UnsupportedModel(
            f"speculator: the layers of {config.model_type} are of a kind that is not supported "
            f"({error})"
        ) from error
    return layers


def _is_chunked(text: PreTrainedConfig, layer: int) -> bool:
    kinds = text.to_dict().get("layer_types") or ()
    return "chunked_attention" in kinds[layer : layer + 1]


def _windows_never_bind(text: PreTrainedConfig) -> bool:
    limit = max_positions(text)
    return limit is not None and text.sliding_window >= limit


def refuse_unfaithful_attention(model: PreTrainedModel) -> DraftKvLayout:
    """Compare a short chunked forward pass with the model's own eager attention.

    Catches what a configuration does not show: soft caps, attention sinks, position biases,
    layers that share keys, and models that do not use transformers' attention interface.
    Leaves the model with the recording attention, and returns what it keeps of each token.
    """
    vocabulary_size = model.config.get_text_config(decoder=True).vocab_size
    tokens = (torch.arange(PROBE_TOKENS, device=model.device) * 7 + 3) % vocabulary_size
    with torch.inference_mode():
        model.set_attn_implementation(attention.NAME)
        layout = _without_idle_windows(_probe_layout(model, tokens[:PROBE_CHUNK]), model)
        with _narrow_windows(model):
            expected = _last_logits_eager(model, tokens)
            model.set_attn_implementation(attention.NAME)
            actual = torch.stack([
                _last_logits(model, tokens.tolist(), layout, quick)
                for quick in (None, Llama.from_model(model))
            ])  # fmt: skip
    tolerance = torch.finfo(actual.dtype).eps ** 0.5 * float(expected.abs().max())
    difference = float((actual - expected).abs().max())
    if not difference <= tolerance:
        raise UnsupportedModel(
            f"speculator: plain causal attention is not what {model.config.model_type} computes "
            f"(its logits differ by {difference:.3g}, more than {tolerance:.3g})"
        )
    return layout


def _without_idle_windows(layout: DraftKvLayout, model: PreTrainedModel) -> DraftKvLayout:
    """Drop windows that no prompt outgrows: these layers see all of it."""
    limit = max_positions(model.config.get_text_config(decoder=True))
    rules = tuple(
        replace(rule, window=None)
        if rule.window is not None and limit is not None and rule.window >= limit
        else rule
        for rule in layout.rules
    )
    return replace(layout, rules=rules)


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Make sliding windows so short inside that they bind in a probe."""
    text = model.config.get_text_config(decoder=True)
    holders: list[Any] = [text, *model.modules()]
    found = [(each, vars(each).get("sliding_window")) for each in holders]
    windowed = [(each, window) for each, window in found if isinstance(window, int)]
    try:
        for each, _ in windowed:
            each.sliding_window = PROBE_WINDOW
        yield
    finally:
        for each, window in windowed:
            each.sliding_window = window


def read_chunk(
    model: PreTrainedModel, parts: Sequence[tuple[Reading, int]], quick: Llama | None = None
) -> None:
    """Read the next tokens of some prompts, a given number of each, in one pass, without logits."""
    tokens = [token for reading, count in parts for token in reading.next_tokens(count)]
    ids, positions = _pack_tokens(model, tokens, parts)
    reading_chunk = attention.ReadChunk(parts)
    if quick is None:
        with suppress(attention.KeysStored):
            _forward(model, ids, positions, reading_chunk)
    else:
        quick.read(ids, positions, reading_chunk)
    for reading, count in parts:
        reading.length += count


def feed_token(
    model: PreTrainedModel, readings: Sequence[Reading], quick: Llama | None = None
) -> Tensor:
    """Feed each reading's next token and record its queries; return logits, [readings, V]."""
    tokens = [reading.next_token for reading in readings]
    ids, positions = _pack_tokens(model, tokens, [(reading, 1) for reading in readings])
    looking = attention.QueryRecorder(readings)
    if quick is None:
        logits: Tensor = _forward(model, ids, positions, looking).logits[0]
    else:
        logits = quick.logits(ids, positions, looking)
    for reading in readings:
        reading.length += 1
    return logits


def _pack_tokens(
    model: PreTrainedModel, tokens: Sequence[int], parts: Sequence[tuple[Reading, int]]
) -> tuple[Tensor, Tensor]:
    """Return the tokens' ids, and each one's position within its own prompt."""
    positions = [
        position
        for reading, count in parts
        for position in range(reading.length, reading.length + count)
    ]
    ids, places = torch.tensor([tokens, positions]).to(model.device)
    return ids, places


def _forward(
    model: PreTrainedModel, ids: Tensor, positions: Tensor, attending: attention.AttentionHook
) -> Any:
    """Make one pass over packed tokens."""
    return model(
        input_ids=ids[None], position_ids=positions[None], use_cache=False, attending=attending
    )


def _probe_layout(model: PreTrainedModel, tokens: Tensor) -> DraftKvLayout:
    probe = attention.LayoutProbe()
    model(input_ids=tokens[None], use_cache=False, attending=probe)
    return probe.layout(model.dtype, model.device)


def _last_logits(
    model: PreTrainedModel, tokens: list[int], layout: DraftKvLayout, quick: Llama | None
) -> Tensor:
    reading = Reading(tuple(tokens), layout, PROBE_TOKENS)
    read_chunk(model, [(reading, PROBE_CHUNK)], quick)
    read_chunk(model, [(reading, reading.unread_tokens)], quick)
    return feed_token(model, [reading], quick)


def _last_logits_eager(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    try:
        model.set_attn_implementation("eager")
    except ValueError as error:
        raise UnsupportedModel(f"speculator: {error}") from error
    logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits[:, -1]
    return logits


def _build(path: str, model_config: PreTrainedConfig, config: SpeculatorConfig) -> PreTrainedModel:
    model: PreTrainedModel
    if not config.random_weights:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            config=model_config,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=False,
        )
        return model
    dtype: Any = model_config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(model_config, dtype=dtype)
    return model


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(name)


def _eos_ids(model: PreTrainedModel) -> frozenset[int]:
    """Return every id that ends an answer, from the generation configuration or the model's own."""
    generation = model.generation_config
    ids = generation.eos_token_id if generation is not None else None
    if ids is None:
        ids = model.config.get_text_config(decoder=True).eos_token_id
    if ids is None:
        return frozenset()
    return frozenset([ids] if isinstance(ids, int) else ids)
