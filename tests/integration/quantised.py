"""Writes a model's linear layers as 4-bit GPTQ or AWQ checkpoints, beside what they stand for.

Round to nearest, symmetric, in groups along the input: quality does not matter here. The formats
are those that AutoGPTQ and AutoAWQ write.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

_GROUP = 32
_ZERO = 8  # of 4-bit values, symmetric
_NIBBLES = 8  # in 32 bits
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_WEIGHTS = "model.safetensors"


class Quantisation(enum.StrEnum):
    """The checkpoints' formats."""

    GPTQ = "gptq"
    AWQ = "awq"


def plain_folder(model: Path) -> Path:
    """Return the folder of the float32 model that a quantised one stands for."""
    return model.with_name(f"{model.name}-dequantised")


def quantise(model: Path, kind: Quantisation) -> None:
    """Quantise the model in place, and write the same numbers in float32 to its plain folder."""
    plain = plain_folder(model)
    plain.mkdir()
    weights = load_file(model / _WEIGHTS)
    quantised, restored = {}, dict(weights)
    for name, weight in weights.items():
        if not name.endswith("_proj.weight"):
            quantised[name] = weight
            continue
        values, scales = _round(weight)
        restored[name] = _dequantise(values, scales)
        stem = name.removesuffix("weight")
        quantised |= {stem + part: tensor for part, tensor in _packed(values, scales, kind)}
    save_file(restored, plain / _WEIGHTS, {"format": "pt"})
    save_file(quantised, model / _WEIGHTS, {"format": "pt"})
    config = json.loads((model / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps(config))
    config["quantization_config"] = _settings(kind)
    (model / "config.json").write_text(json.dumps(config))


def _settings(kind: Quantisation) -> dict[str, object]:
    shared = {"quant_method": kind.value, "bits": 4, "group_size": _GROUP}
    if kind is Quantisation.GPTQ:
        return {**shared, "desc_act": False, "sym": True, "lm_head": False}
    return {**shared, "zero_point": True, "version": "gemm"}


def _round(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return values `[in, out]` int32 in [0, 15] and scales `[groups, out]` float16."""
    grouped = weight.T.unflatten(0, (-1, _GROUP))  # [groups, group, out]
    scales = (grouped.abs().amax(1) / 7).clamp(min=1e-4).half()
    values = (grouped / scales.float()[:, None]).round().clamp(-8, 7) + _ZERO
    return values.flatten(0, 1).int(), scales


def _dequantise(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return the weight `[out, in]`, float32."""
    each = scales.float().repeat_interleave(_GROUP, 0)
    return ((values - _ZERO).float() * each).T.contiguous()


def _packed(
    values: torch.Tensor, scales: torch.Tensor, kind: Quantisation
) -> Iterator[tuple[str, torch.Tensor]]:
    rows, columns = values.shape
    yield "scales", scales
    if kind is Quantisation.GPTQ:
        yield "qweight", _pack(values.T.contiguous()).T.contiguous()
        # The format stores the zero less one.
        yield "qzeros", _pack(torch.full((rows // _GROUP, columns), _ZERO - 1, dtype=torch.int32))
        yield "g_idx", torch.arange(rows, dtype=torch.int32) // _GROUP
        return
    yield "qweight", _pack(_in_awq_order(values))
    zeros = torch.full((rows // _GROUP, columns), _ZERO, dtype=torch.int32)
    yield "qzeros", _pack(_in_awq_order(zeros))


def _in_awq_order(values: torch.Tensor) -> torch.Tensor:
    return values.unflatten(1, (-1, _NIBBLES))[:, :, _AWQ_ORDER].flatten(1)


def _pack(values: torch.Tensor) -> torch.Tensor:
    """Pack `[n, m]` 4-bit values along the last dimension into `[n, m / 8]` int32."""
    shifts = torch.arange(0, 32, 4)
    words = (values.unflatten(1, (-1, _NIBBLES)).long() << shifts).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()
