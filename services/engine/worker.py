"""vLLM workers whose models see sparse positions: `worker_cls` of both engines.

The V1 model runner is replaced by a subclass that rewrites the positions after
preprocessing; with the V2 runner the model state provides them (see `model_state`).
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.distributed.parallel_state import get_pp_group
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from .guard import refuse_unsupported
from .sparse import SparseBatch

POSITIONS_FIELD = 2  # of what GPUModelRunner._preprocess returns


class SparseCPUModelRunner(CPUModelRunner):  # type: ignore[misc]
    """vLLM's CPU runner at sparse positions."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sparse_batch = SparseBatch(device)

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        fields = super()._preprocess(scheduler_output, *args, **kwargs)
        _rewrite_positions(self, scheduler_output, fields[POSITIONS_FIELD])
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

    def _sample(self, *args: Any, **kwargs: Any) -> Any:
        """Sample; seeded requests still in their prompt get their generator's state back.

        Their token is discarded. vLLM rewinds the generator by an offset, which generators
        on CPUs do not have: the engine would die of a seeded prompt of two chunks.
        """
        states = {row: one.get_state() for row, one in self._partial_generators().items()}
        sampled = super()._sample(*args, **kwargs)
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
        """Seeded generators of the requests whose prompt goes on after this step, by row."""
        partial = self.discard_request_mask.np[: self.input_batch.num_reqs]
        generators: dict[int, torch.Generator] = self.input_batch.generators
        return {row: one for row, one in generators.items() if partial[row]}


class SparseGPUModelRunner(GPUModelRunner):  # type: ignore[misc]
    """vLLM's V1 GPU runner at sparse positions."""

    def __init__(self, vllm_config: Any, device: torch.device) -> None:
        super().__init__(vllm_config, device)
        self.sparse_batch = SparseBatch(device)

    def _preprocess(self, scheduler_output: SchedulerOutput, *args: Any, **kwargs: Any) -> Any:
        fields = super()._preprocess(scheduler_output, *args, **kwargs)
        _rewrite_positions(self, scheduler_output, fields[POSITIONS_FIELD])
        return fields


class SparseCPUWorker(CPUWorker):  # type: ignore[misc]
    """`worker_cls` of an engine on CPUs."""

    def init_device(self) -> None:
        """Set the device up as vLLM does, then run the sparse model runner on it."""
        refuse_unsupported(self.vllm_config)
        super().init_device()
        self.model_runner = SparseCPUModelRunner(self.vllm_config, torch.device("cpu"))

    def kv_address(self) -> str | None:
        """Where this worker's KV port listens; called over `collective_rpc`."""
        return _kv_address()

    def kv_carrier(self) -> str:
        """By what this worker hands KV over or takes it, beside gRPC."""
        return _kv_carrier()


class SparseGPUWorker(Worker):  # type: ignore[misc]
    """`worker_cls` of an engine on GPUs, for either model runner."""

    def init_device(self) -> None:
        """Set the device up as vLLM does; the V1 runner is replaced by the sparse one."""
        refuse_unsupported(self.vllm_config)
        super().init_device()
        if not self.use_v2_model_runner:
            self.model_runner = SparseGPUModelRunner(self.vllm_config, self.device)

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the weights; the V2 runner's model state is replaced by the sparse one."""
        super().load_model(*args, **kwargs)
        if self.use_v2_model_runner:
            from .model_state import sparse_model_state

            self.model_runner.model_state = sparse_model_state(self.model_runner.model_state)

    def kv_address(self) -> str | None:
        """Where this worker's KV port listens; called over `collective_rpc`."""
        return _kv_address()

    def kv_carrier(self) -> str:
        """By what this worker hands KV over or takes it, beside gRPC."""
        return _kv_carrier()


def _kv_address() -> str | None:
    address: str | None = get_kv_transfer_group().kv_address
    return address


def _kv_carrier() -> str:
    carrier: str = get_kv_transfer_group().kv_carrier
    return carrier


def _rewrite_positions(
    runner: SparseCPUModelRunner | SparseGPUModelRunner,
    scheduler_output: SchedulerOutput,
    positions: torch.Tensor,
) -> None:
    runner.sparse_batch.forget(scheduler_output.finished_req_ids)
    runner.sparse_batch.rewrite(
        positions,
        runner.input_batch.req_ids,
        scheduler_output.num_scheduled_tokens,
        runner.requests,
    )
