"""Finds what the speculator would report when it loads, from configurations and tokenizers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import torch
from transformers import PreTrainedConfig

from ..config import SpeculatorConfig
from ..core.errors import UnsupportedModel
from ..core.findings import Finding, error, note, warning
from .draft import max_positions, read_config, refuse_unsupported_cache
from .scorer import CPU_MEMORY_BYTES
from .translation import load_translator

_PATH = "speculator.path"


def check_speculator(
    config: SpeculatorConfig, folder: Path, main_folder: Path | None, longest: int | None
) -> Iterator[Finding]:
    """Yield the findings against the draft model in `folder`.

    `longest` is the longest prompt, None where the main model does not limit it.
    """
    try:
        model = read_config(str(folder))
        refuse_unsupported_cache(model)
    except UnsupportedModel as refused:
        yield error(_PATH, str(refused).removeprefix("speculator: "))
        return
    if main_folder is not None:
        yield from _check_tokenizers(main_folder, folder)
    text = model.get_text_config(decoder=True)
    yield from _check_heads(config, text)
    if longest is not None:
        yield from _check_sizes(config, text, longest)


def _check_tokenizers(main: Path, draft: Path) -> Iterator[Finding]:
    try:
        translator = load_translator(str(main), str(draft))
    except UnsupportedModel as refused:
        yield error(_PATH, str(refused).removeprefix("speculator: "))
    else:
        if translator is not None:
            yield note(_PATH, "its tokenizer differs from the main model's: it reads the text")


def _check_heads(config: SpeculatorConfig, text: PreTrainedConfig) -> Iterator[Finding]:
    key = "speculator.score_heads"
    for layer, heads in (config.score_heads or {}).items():
        if layer >= text.num_hidden_layers:
            yield error(key, f"there is no layer {layer}, the last is {text.num_hidden_layers - 1}")
        elif not heads or max(heads) >= text.num_attention_heads:
            yield error(
                key, f"layer {layer} has heads 0 to {text.num_attention_heads - 1}, not {[*heads]}"
            )


def _check_sizes(
    config: SpeculatorConfig, text: PreTrainedConfig, longest: int
) -> Iterator[Finding]:
    looks_ahead = config.score_queries != "question"
    generated = config.look_ahead - 1 if looks_ahead else 0
    needed = longest + generated
    positions = max_positions(text)
    if positions is not None and positions < needed:
        yield warning(
            _PATH,
            f"the model has {positions} positions: prompts of more than "
            f"{positions - generated} tokens, of {longest}, are prefilled dense",
        )
    budget = _budget_bytes(config)
    kv = DraftKv.from_config(text, config.dtype)
    if config.score_heads is not None and not looks_ahead:  # the layers behind these are left out
        kv = replace(kv, layers=min(kv.layers, max(config.score_heads) + 1))
    each = kv.bytes_per_token
    if budget is not None and each * needed > budget:
        yield warning(
            "speculator.kv_memory_bytes",
            f"{budget} bytes hold the keys and values of {budget // each} tokens: longer prompts "
            f"are prefilled dense; prompts of {longest} tokens need {each * needed}",
        )


def _budget_bytes(config: SpeculatorConfig) -> int | None:
    """Return the KV budget; None where it depends on a GPU's free memory."""
    if config.kv_memory_bytes is not None:
        return config.kv_memory_bytes
    return CPU_MEMORY_BYTES if config.device == "cpu" else None


@dataclass(frozen=True, slots=True)
class DraftKv:
    """The KV of one token in a draft model, by its configuration."""

    layers: int
    kv_heads: int
    head_dim: int
    itemsize: int

    @classmethod
    def from_config(cls, text: PreTrainedConfig, dtype: str) -> Self:
        """Read the sizes of a text model; transformers' names for them, or their defaults."""
        settings = text.to_dict()
        heads = text.num_attention_heads
        wanted = text.dtype if dtype == "auto" else getattr(torch, dtype)
        return cls(
            layers=text.num_hidden_layers,
            kv_heads=settings.get("num_key_value_heads") or heads,
            head_dim=settings.get("head_dim") or text.hidden_size // heads,
            itemsize=(wanted or torch.float32).itemsize,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layers * self.kv_heads * self.head_dim * self.itemsize
