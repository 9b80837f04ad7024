"""The KV hand-off as a vLLM connector (`kv_connector_module_path` of both engines).

vLLM makes one instance in the scheduler and one in each worker. Each delegates to a half
that only knows its own side; what passes between them is in `handoff`.
"""

from __future__ import annotations

from typing import Any

import torch
from pydantic import TypeAdapter
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)

from .groups import KvGroups
from .orders import HandoffConfig, PullTimes
from .scheduler import SchedulerHalf
from .worker import WorkerHalf

_CONFIG = TypeAdapter(HandoffConfig)


class SpecPrefillConnector(KVConnectorBase_V1):  # type: ignore[misc]
    """Prefill side: a copy of each layer's KV under a lease. Decode side: an async pull."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        transfer = self._kv_transfer_config
        config = _CONFIG.validate_python(transfer.kv_connector_extra_config)
        groups = KvGroups.from_caches(kv_cache_config, vllm_config.cache_config.block_size)
        producer = transfer.is_kv_producer
        if role is KVConnectorRole.SCHEDULER:
            algorithm = vllm_config.cache_config.prefix_caching_hash_algo
            self._scheduler = SchedulerHalf(algorithm, groups, producer)
        else:
            self._worker = WorkerHalf(vllm_config, config, groups, producer=producer)

    @classmethod
    def requires_piecewise_for_cudagraph(cls, extra_config: dict[str, Any]) -> bool:
        """Return True on the prefill side: per-layer copies are Python between graph pieces."""
        return bool(extra_config.get("stages_layers", False))

    # The scheduler's half.

    def on_new_request(self, request: Any) -> None:
        """Hash the request's blocks with their positions, before it is scheduled."""
        self._scheduler.new_request(request, self._kv_cache_manager)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int, bool]:
        """Return the number of prompt tokens to pull, and that the pull runs in the background."""
        tokens = self._scheduler.tokens_to_pull(request, num_computed_tokens)
        return tokens, tokens > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Start the pull: its blocks are allocated."""
        self._scheduler.order_pull(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        """Return the workers' orders for this step."""
        return self._scheduler.orders(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Note the pulls that ended, well or not."""
        self._scheduler.record_pulls(
            connector_output.finished_recving or set(),
            connector_output.failed_recving or set(),
            connector_output.kv_connector_worker_meta,
        )

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return that the blocks are free at once: what is handed over is a copy."""
        del block_ids
        return False, self._scheduler.output_fields(request)

    def has_pending_push_work(self) -> bool:
        """Keep an idle engine stepping until its orders are out."""
        return self._scheduler.has_orders()

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """Store the workers' endpoints, by pipeline stage and tensor-parallel rank."""
        self._scheduler.set_peers([metadata[rank] for rank in sorted(metadata)])

    # The workers' half.

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout of the caches, which exist by now, and start to listen."""
        self._worker.start(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        """Return the endpoint from which this worker's leases can be pulled."""
        return self._worker.endpoint()

    @property
    def kv_address(self) -> str | None:
        """Return the address of this worker's KV port; None on the decode side."""
        return self._worker.address

    @property
    def kv_carrier(self) -> str:
        """Return the best carrier that this worker has."""
        return self._worker.carrier

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Start this step's pulls in the background."""
        del forward_context, kwargs
        self._worker.start_pulls(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Return at once: a request is scheduled only when all of its KV is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Copy this layer's new tokens out, while later layers compute."""
        del kv_layer, attn_metadata, kwargs
        self._worker.stage(layer_name, self._get_connector_metadata())

    def wait_for_save(self) -> None:
        """Wait for the copies: they must be done before their blocks may be reused."""
        self._worker.finish_step(self._get_connector_metadata())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Return the pulls that ended since the last step; cancel aborted requests' pulls."""
        return self._worker.take_results(finished_req_ids)

    def build_connector_worker_meta(self) -> PullTimes | None:
        """Return the durations of the pulls that have ended since the last step."""
        return self._worker.take_pull_times()

    def shutdown(self) -> None:
        """Stop serving and pulling."""
        if self.role is KVConnectorRole.WORKER:
            self._worker.stop()


class HybridConnector(SpecPrefillConnector, SupportsHMA):  # type: ignore[misc]
    """The same for models with recurrent layers, whose caches are paged in several groups.

    With a connector that is none of this kind, vLLM pages other models' caches in one group.
    """

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        """Return that the blocks are free at once: what is handed over is a copy."""
        return self.request_finished(request, block_ids[0])
