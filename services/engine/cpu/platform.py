"""vLLM's CPU platform with one-process engines, and right positions in MLA layers."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.platforms.cpu import CpuPlatform

if TYPE_CHECKING:  # vllm.config imports the platform
    from vllm.config import VllmConfig


class CpuEnginePlatform(CpuPlatform):  # type: ignore[misc]
    """vLLM's CPU platform, with one-process engines and right positions in MLA layers."""

    ray_device_key = "GPU"  # the only key that vLLM's Ray executor can resolve for CPU nodes
    ray_noset_device_env_vars = ["RAY_EXPERIMENTAL_NOSET_CUDA_VISIBLE_DEVICES"]  # noqa: RUF012

    @classmethod
    def check_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Keep the uniproc executor that the caller asked for; vLLM would take `mp`.

        MLA layers rotate a slice of each query. vLLM's rotary kernel for CPUs takes it for
        contiguous and rotates other numbers; vLLM's implementation in PyTorch does not.
        """
        asked = vllm_config.parallel_config.distributed_executor_backend
        super().check_and_update_config(vllm_config)
        if asked == "uni":
            vllm_config.parallel_config.distributed_executor_backend = "uni"
        model = vllm_config.model_config
        if model is not None and model.use_mla:
            vllm_config.compilation_config.custom_ops.append("-rotary_embedding")
