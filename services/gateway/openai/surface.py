"""The rest of vLLM's engine client interface, beyond answering prompts.

The gateway holds no engine: engines live in other processes and manage themselves. So
maintenance calls are refused or do nothing, and the client never reports itself dead (vLLM's
server would stop for good); the gateway's own `/health` reports health.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Mapping
from typing import Any

from typing_extensions import override
from vllm.engine.protocol import EngineClient
from vllm.inputs import EngineInput, PromptType
from vllm.lora.request import LoRARequest
from vllm.outputs import PoolingRequestOutput
from vllm.pooling_params import PoolingParams
from vllm.tasks import SupportedTask

TASKS: tuple[SupportedTask, ...] = ("generate",)


class RemoteEngineClient(EngineClient):  # type: ignore[misc]
    """The part of an engine client that is the same for every engine elsewhere."""

    @property
    @override
    def is_running(self) -> bool:
        return True

    @property
    @override
    def is_stopped(self) -> bool:
        return False

    @property
    @override
    def errored(self) -> bool:
        return False

    @property
    @override
    def dead_error(self) -> BaseException:
        return RuntimeError("the gateway holds no engine that could die")

    @override
    async def get_supported_tasks(self) -> tuple[SupportedTask, ...]:
        return TASKS

    @override
    def encode(
        self,
        prompt: PromptType | EngineInput,
        pooling_params: PoolingParams,
        request_id: str,
        lora_request: LoRARequest | None = None,
        trace_headers: Mapping[str, str] | None = None,
        priority: int = 0,
        tokenization_kwargs: dict[str, Any] | None = None,
        reasoning_ended: bool | None = None,
    ) -> AsyncGenerator[PoolingRequestOutput, None]:
        raise NotImplementedError("embeddings and pooling are not served here")

    @override
    async def abort(self, request_id: str | Iterable[str]) -> None:
        """Do nothing: closing `generate()` is what aborts."""

    @override
    async def notify_kv_transfer_request_rejected(
        self,
        request_id: str,
        kv_transfer_params: dict[str, Any],
        *,
        data_parallel_rank: int | None = None,
    ) -> None:
        """Do nothing: clients hold no KV here."""

    @override
    async def is_tracing_enabled(self) -> bool:
        return False

    @override
    async def do_log_stats(self) -> None:
        """Do nothing: the engines log their own."""

    @override
    async def check_health(self) -> None:
        """Do nothing: see `health.py`."""

    @override
    async def start_profile(
        self,
        profile_prefix: str | None = None,
        *,
        delay_iterations: int | None = None,
        max_iterations: int | None = None,
    ) -> None:
        raise NotImplementedError("profile the engines, not the gateway")

    @override
    async def stop_profile(self) -> None:
        raise NotImplementedError("profile the engines, not the gateway")

    @override
    async def reset_mm_cache(self) -> None:
        """Do nothing: there are no multi-modal inputs."""

    @override
    async def reset_encoder_cache(self) -> None:
        """Do nothing: there are no multi-modal inputs."""

    @override
    async def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        return False

    @override
    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        raise NotImplementedError("scale the pools instead of putting engines to sleep")

    @override
    async def release_kv_cache_memory(self) -> None:
        raise NotImplementedError("scale the pools instead of releasing their memory")

    @override
    async def wake_up(self, tags: list[str] | None = None) -> bool:
        return True

    @override
    async def is_sleeping(self) -> bool:
        return False

    @override
    async def add_lora(self, lora_request: LoRARequest) -> bool:
        return False

    @override
    async def pause_generation(self, *, mode: str = "abort", clear_cache: bool = True) -> None:
        raise NotImplementedError("scale the pools instead of pausing them")

    @override
    async def resume_generation(self) -> None:
        raise NotImplementedError("scale the pools instead of pausing them")

    @override
    async def is_paused(self) -> bool:
        return False

    @override
    def shutdown(self, timeout: float | None = None) -> None:
        """Do nothing: the engines outlive the gateway."""
