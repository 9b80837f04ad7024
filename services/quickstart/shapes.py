"""The sizes of a model, from its configuration and the lengths of its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..core.errors import UnsupportedModel

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")  # the first kind that is there
_ITEMSIZE = {"float32": 4, "float64": 8}  # any other dtype: two bytes
_BFLOAT16 = 2


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A model's sizes, as far as memory and time depend on them."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    kv_numbers: int  # that one token leaves in the KV cache
    positions: int | None  # None: no limit is configured
    weight_bytes: int  # as stored
    itemsize: int  # of one stored weight, in bytes
    is_quantized: bool = False
    is_latent: bool = False  # multi-head latent attention: no heads to divide the KV cache by

    @property
    def parameters(self) -> int:
        """The number of weights; for quantized ones, at most."""
        return self.weight_bytes // (1 if self.is_quantized else self.itemsize)

    def memory(self, itemsize: int | None) -> int:
        """Return the bytes of the loaded weights; None: in the type that they are stored in."""
        if itemsize is None or self.is_quantized:
            return self.weight_bytes
        return self.parameters * itemsize

    def kv_bytes(self, itemsize: int | None) -> int:
        """Return the bytes of one token's keys and values."""
        stored = _BFLOAT16 if self.is_quantized else self.itemsize
        return self.kv_numbers * (stored if itemsize is None else itemsize)

    def kv_parts(self, workers: int) -> int:
        """Return how many parts of the keys and values lie on different tensor-parallel workers."""
        return 1 if self.is_latent else min(workers, self.kv_heads)

    def prompt_operations(self, tokens: int) -> float:
        """Return the floating-point operations that a prompt costs: weights and attention."""
        return 2.0 * self.parameters * tokens + 2.0 * self.layers * self.hidden * tokens**2


# Where prompts are chosen by words.
NO_DRAFT = ModelShape(
    layers=0,
    hidden=0,
    heads=0,
    kv_heads=0,
    kv_numbers=0,
    positions=None,
    weight_bytes=0,
    itemsize=_BFLOAT16,
)


def read_shape(folder: Path) -> ModelShape:
    """Read a model's sizes. Raises UnsupportedModel with the reason."""
    from transformers import AutoConfig

    from ..speculator.draft import max_positions

    try:
        whole = AutoConfig.from_pretrained(folder)
        text = whole.get_text_config(decoder=True)
        layers, heads = text.num_hidden_layers, text.num_attention_heads
        hidden = text.hidden_size
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{folder}: config.json cannot be used: {reason}") from error
    settings = text.to_dict()
    stored = str(getattr(whole, "dtype", None) or getattr(text, "dtype", None)).rpartition(".")[2]
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=settings.get("num_key_value_heads") or heads,
        kv_numbers=layers * _numbers_per_layer(settings, hidden, heads),
        positions=max_positions(text),
        weight_bytes=_weight_bytes(folder),
        itemsize=_ITEMSIZE.get(stored, _BFLOAT16),
        is_quantized=settings.get("quantization_config") is not None
        or getattr(whole, "quantization_config", None) is not None,
        is_latent=_is_latent(settings),
    )


def _is_latent(settings: Mapping[str, Any]) -> bool:
    return bool(settings.get("kv_lora_rank"))


def _numbers_per_layer(settings: Mapping[str, Any], hidden: int, heads: int) -> int:
    if _is_latent(settings):
        return int(settings["kv_lora_rank"] + settings["qk_rope_head_dim"])
    kv_heads = settings.get("num_key_value_heads") or heads
    return int(2 * kv_heads * (settings.get("head_dim") or hidden // heads))


def _weight_bytes(folder: Path) -> int:
    """Return the length of the weight files. Raises UnsupportedModel where there are none."""
    for pattern in _WEIGHTS:
        sizes = [path.stat().st_size for path in folder.glob(pattern)]
        if sizes:
            return sum(sizes)
    raise UnsupportedModel(f"{folder}: holds no weights ({' or '.join(_WEIGHTS)})")
