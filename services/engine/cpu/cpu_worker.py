"""vLLM's CPU worker at sparse positions: `worker_cls` of an engine on CPUs.

The V1 model runner is replaced by a subclass that rewrites the positions after preprocessing;
the V2 runner, which runs here under Triton's interpreter, gets them from its model state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec, MambaSpec
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker

from ..sparse.batch import SparseBatch
from ..sparse.guard import refuse_unreadable_caches
from ..sparse.positions_v1 import rewrite_positions
from ..speculation.runner_v1 import drafts_or_none, speculate_from_prompts
from ..support import refuse_unsupported, support_of_config
from ..vllm_internals import check_cpu_caches, check_v1_runner, step_positions
from ..worker_rpc import KvRpc
from .platform import rotate_slices_rightly


class SparseCPUModelRunner(CPUModelRunner):  # type: ignore[misc]
    """vLLM's CPU runner at sparse positions."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sparse_batch = SparseBatch(device, last=self.max_model_len - 1)
        speculate_from_prompts(self)

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        fields = super()._preprocess(scheduler_output, *args, **kwargs)
        rewrite_positions(self, scheduler_output, step_positions(fields))
        return fields

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model; a later pipeline stage gets the buffers of its input.

        vLLM makes them in a warm-up that eager engines on CPUs do not run.
        """
        super().load_model(*args, **kwargs)
        if not get_pp_group().is_first_rank:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                self.max_num_tokens, self.model_config.dtype, self.device
            )

    def _sample(self, logits: Any, spec_decode_metadata: Any) -> Any:
        """Sample; seeded requests still in their prompt get their generator's state back.

        Their token is discarded. vLLM rewinds the generator by an offset, which generators
        on CPUs do not have: a seeded prompt of two chunks would crash the engine.
        """
        states = {row: one.get_state() for row, one in self._partial_generators().items()}
        sampled = super()._sample(logits, drafts_or_none(spec_decode_metadata))
        for row, state in states.items():
            self.input_batch.generators[row].set_state(state)
        return sampled

    def _bookkeeping_sync(self, *args: Any, **kwargs: Any) -> Any:
        """vLLM's bookkeeping, which must not find the generators that are rewound already."""
        rewound = self._partial_generators()
        for row in rewound:
            del self.input_batch.generators[row]
        try:
            return super()._bookkeeping_sync(*args, **kwargs)
        finally:
            self.input_batch.generators.update(rewound)

    def _partial_generators(self) -> dict[int, torch.Generator]:
        """Return the seeded generators, by row, of requests whose prompt is not finished yet."""
        partial = self.discard_request_mask.np[: self.input_batch.num_reqs]
        generators: dict[int, torch.Generator] = self.input_batch.generators
        return {row: one for row, one in generators.items() if partial[row]}


class SparseCPUWorker(KvRpc, CPUWorker):  # type: ignore[misc]
    """`worker_cls` of an engine on CPUs, for either model runner."""

    def init_device(self) -> None:
        """Set the device up as vLLM does; the V1 runner is replaced by the sparse one."""
        refuse_unsupported(self.vllm_config)
        check_cpu_caches()
        rotate_slices_rightly(self.vllm_config)  # whichever platform made the configuration
        super().init_device()
        if not self.use_v2_model_runner:
            check_v1_runner(CPUModelRunner)
            self.model_runner = SparseCPUModelRunner(self.vllm_config, torch.device("cpu"))
        else:
            # Needs Triton's interpreter, which an engine with the V1 runner does without.
            from ..sparse.model_state import check_runner_class

            check_runner_class(type(self.model_runner))

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return the layers' caches; no state in the middle of a step.

        vLLM's Mamba2 on CPUs returns a request's last state only, where its layers promise to save
        one in the middle, and fails. Without the promise, steps end where states are saved.
        """
        specs: dict[str, KVCacheSpec] = super().get_kv_cache_spec()
        return {
            layer: replace(spec, num_prefill_checkpoint_blocks=0, prefill_checkpoint_alignment=None)
            if isinstance(spec, MambaSpec)
            else spec
            for layer, spec in specs.items()
        }

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
            from ..sparse.model_state import make_sparse  # see init_device

            make_sparse(self.model_runner)
