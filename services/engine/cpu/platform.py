"""vLLM's CPU platform with one-process engines, and right positions in MLA layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum

if TYPE_CHECKING:  # vllm.config imports the platform
    from vllm.config import VllmConfig


class CpuEnginePlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, with one-process engines and right positions in MLA layers."""

    ray_device_key = "GPU"  # the only key that vLLM's Ray executor can resolve for CPU nodes
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]  # noqa: RUF012

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Keep the uniproc executor that the caller asked for; vLLM would take `mp`.

        On CPUs with AMX, vLLM takes kernels for MLA that refuse float32; those for all CPUs do not.
        """
        model = vllm_config.model_config
        latent = model is not None and model.use_mla
        if latent and model.dtype is torch.float32:
            vllm_config.attention_config.backend = AttentionBackendEnum.CPU_MLA
        asked = vllm_config.parallel_config.distributed_executor_backend
        super().check_and_update_config(vllm_config)
        if asked == "uni":
            vllm_config.parallel_config.distributed_executor_backend = "uni"
        rotate_slices_rightly(vllm_config)

    @classmethod
    def register_triton_kernel_overrides(cls) -> None:
        """Register vLLM's kernels on CPUs, and a right one that expands sampling parameters.

        vLLM's converts every tensor to integers, the result to a copy that is lost: proposals of
        sampled requests would be checked at temperatures of uninitialised memory.
        """
        super().register_triton_kernel_overrides()
        from vllm.triton_utils import HAS_TRITON
        from vllm.triton_utils.dispatcher import register_kernels

        if not HAS_TRITON:
            register_kernels({"vllm.v1.sample.rejection_sampler.expand_kernel": expand_kernel})


def rotate_slices_rightly(vllm_config: VllmConfig) -> None:
    """Take vLLM's rotary embedding in PyTorch for MLA layers, which rotate a slice of each query.

    vLLM's rotary kernel for CPUs takes the slice for contiguous and rotates other numbers.
    """
    model, ops = vllm_config.model_config, vllm_config.compilation_config.custom_ops
    if model is not None and model.use_mla and "-rotary_embedding" not in ops:
        ops.append("-rotary_embedding")


def expand_kernel(
    output: torch.Tensor,
    values: torch.Tensor,
    ends: torch.Tensor,
    replace_from: float,
    replace_to: float,
    max_tokens: int | None = None,
) -> None:
    """Write each request's value once per proposed token, as vLLM's Triton kernel does.

    `output` is `[tokens]`, `values` and `ends` are `[requests]`; `ends` counts the tokens of a
    request and of those before it. Values of `replace_from` become `replace_to`.
    """
    del max_tokens
    counts = ends.diff(prepend=ends.new_zeros(1)).long()
    replaced = values.masked_fill(values == replace_from, replace_to)
    output.copy_(replaced.repeat_interleave(counts))
