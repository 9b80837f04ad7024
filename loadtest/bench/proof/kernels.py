"""The installed software, and vLLM's own kernels against torch."""

from __future__ import annotations

import platform
import time

import torch
import transformers
from torch import Tensor

from .findings import Sheet
from .machine import ProofMachine


def prove(sheet: Sheet, machine: ProofMachine) -> None:
    """Check the versions, the device, and the kernels that a dense Llama needs."""
    started_s = time.monotonic()
    import vllm
    from vllm.platforms import current_platform

    sheet.measure(
        "versions",
        python=platform.python_version(),
        torch=torch.__version__,
        transformers=transformers.__version__,
        vllm=vllm.__version__,
        platform=type(current_platform).__name__,
        import_s=time.monotonic() - started_s,
    )
    if machine.cpu:
        return
    free, total = torch.cuda.mem_get_info()
    sheet.measure(
        "device",
        name=torch.cuda.get_device_name(),
        capability=torch.cuda.get_device_capability(),
        free_gb=free / 1e9,
        total_gb=total / 1e9,
        cuda=torch.version.cuda,
    )
    _check_operations(sheet)
    for head_dim in (64, 128):
        _check_attention(sheet, head_dim)


def _check_operations(sheet: Sheet) -> None:
    from vllm import _custom_ops as ops

    x, weight = _random(64, 256), torch.rand(256, device="cuda", dtype=torch.bfloat16)
    normed = torch.empty_like(x)
    ops.rms_norm(normed, x, weight, 1e-5)
    expected = torch.nn.functional.rms_norm(x.float(), (256,), weight.float(), 1e-5)
    _compare(sheet, "rms_norm", normed, expected, 0.05)
    gated, activated = _random(64, 512), torch.empty_like(x)
    torch.ops._C.silu_and_mul(activated, gated)
    expected = torch.nn.functional.silu(gated[:, :256].float()) * gated[:, 256:].float()
    _compare(sheet, "silu_and_mul", activated, expected, 0.1)


def _check_attention(sheet: Sheet, head_dim: int) -> None:
    from vllm.vllm_flash_attn import flash_attn_varlen_func
    from vllm.vllm_flash_attn.flash_attn_interface import is_fa_version_supported

    version = 3 if is_fa_version_supported(3) else 2
    query, key, value = (_random(96, heads, head_dim) for heads in (4, 2, 2))
    ends = torch.tensor([0, 96], device="cuda", dtype=torch.int32)
    found = flash_attn_varlen_func(
        query, key, value, max_seqlen_q=96, cu_seqlens_q=ends, max_seqlen_k=96,
        cu_seqlens_k=ends, causal=True, fa_version=version,
    )  # fmt: skip
    batched = (one.transpose(0, 1)[None].float() for one in (query, key, value))
    expected = torch.nn.functional.scaled_dot_product_attention(
        *batched, is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    _compare(sheet, f"FlashAttention {version}, head size {head_dim}", found, expected, 0.05)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def _compare(sheet: Sheet, what: str, found: Tensor, expected: Tensor, tolerance: float) -> None:
    gap = float((found.float() - expected).abs().max())
    sheet.check(what, gap < tolerance, gap=gap, tolerance=tolerance)
