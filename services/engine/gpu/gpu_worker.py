"""vLLM's GPU worker at sparse positions: `worker_cls` of an engine on GPUs.

The V1 model runner is replaced by a subclass that rewrites the positions after preprocessing;
the V2 runner's model state provides them.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from ..sparse.batch import SparseBatch
from ..sparse.guard import refuse_unreadable_caches
from ..sparse.model_state import check_runner_class, make_sparse
from ..sparse.positions_v1 import rewrite_positions
from ..speculation.runner_v1 import drafts_or_none, speculate_from_prompts
from ..support import refuse_unsupported, support_of_config
from ..vllm_internals import check_v1_runner, step_positions
from ..worker_rpc import KvRpc


class SparseGPUModelRunner(GPUModelRunner):  # type: ignore[misc]
    """vLLM's V1 GPU runner at sparse positions."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sparse_batch = SparseBatch(device, last=self.max_model_len - 1)
        speculate_from_prompts(self)

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        fields = super()._preprocess(scheduler_output, *args, **kwargs)
        rewrite_positions(self, scheduler_output, step_positions(fields))
        return fields

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        return super()._sample(logits, drafts_or_none(spec_decode_metadata))


class SparseGPUWorker(KvRpc, Worker):  # type: ignore[misc]
    """`worker_cls` of an engine on GPUs, for either model runner."""

    def init_device(self) -> None:
        """Set the device up as vLLM does; the V1 runner is replaced by the sparse one."""
        refuse_unsupported(self.vllm_config)
        super().init_device()
        if not self.use_v2_model_runner:
            check_v1_runner(GPUModelRunner)
            self.model_runner = SparseGPUModelRunner(self.vllm_config, self.device)
        else:
            check_runner_class(type(self.model_runner))

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate the KV caches, whose format is known by now."""
        if self.vllm_config.kv_transfer_config is not None:
            refuse_unreadable_caches(self.vllm_config, kv_cache_config)
        super().initialize_from_config(kv_cache_config)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights; the V2 runner's model state is replaced by the sparse one.

        Not where the model has no positions to keep: its state may be one of its own.
        """
        super().load_model(*args, **kwargs)
        if self.use_v2_model_runner and support_of_config(self.vllm_config).keeps_positions:
            make_sparse(self.model_runner)
