"""The connector's half in a worker: a holder on the prefill side, a puller on the decode side."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from vllm.config import VllmConfig
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorTransferResults

from ...core.types import Carrier
from ...kv.nixl.agent import NixlAgent, agent_for
from ...kv.shards import readers
from ...kv.tls import watch_tls
from .caches import Caches
from .device import device_of
from .groups import KvGroups
from .holder import Holder
from .layout import fingerprint, layout_of
from .orders import HandoffConfig, KvEndpoint, Orders, PullTimes
from .puller import Puller, WorkerPlace
from .split import own_split, peer_split, worker_rank

logger = logging.getLogger("vllm.specprefill.handoff")


class WorkerHalf:
    """Made before the caches exist; `start` makes the side that this engine is on."""

    def __init__(
        self, vllm_config: VllmConfig, config: HandoffConfig, groups: KvGroups, *, producer: bool
    ) -> None:
        self._vllm_config = vllm_config
        self._config = config
        self._groups = groups
        self._producer = producer
        self._tls = watch_tls(config.tls)
        own = own_split(vllm_config)
        self._place = WorkerPlace(worker_rank(own), own, peer_split(vllm_config, config))
        self._carrier = Carrier.GRPC
        self._holder: Holder | None = None
        self._puller: Puller | None = None

    def start(self, caches: dict[str, torch.Tensor]) -> None:
        """Learn the layout; listen for pulls, or get ready to pull."""
        one = next(
            cache
            for name, cache in caches.items()
            if not self._groups.recurrent[self._groups.of_layer[name]]
        )
        device = device_of(one)
        layout = layout_of(one, latent=self._vllm_config.model_config.use_mla)
        place = self._place
        layout_id = fingerprint(
            self._vllm_config,
            place.own if self._producer else place.peers,
            one,
            layout,
            self._config.adapters,
        )
        if self._config.memory == "device":
            layout_id += "-device"  # engines that hold KV elsewhere cannot take it over
        if self._groups.has_states:
            layout_id += f"-states-{self._groups.block_size}"  # whose places depend on it
        known = Caches(caches, layout, device, self._groups, layout_id)
        with _any_core():  # threads inherit the affinity of the one that makes them
            if self._producer:
                equal = self._groups.has_states  # then each worker pulls from its own rank
                count = 1 if equal else readers(place.rank, place.own, place.peers)
                self._holder = Holder(self._config, known, device, readers=count)
                self._carrier = Carrier(self._holder.carrier)
            else:
                nixl = self._agent()
                in_device = self._config.memory == "device"
                self._carrier = Carrier.NIXL if nixl or in_device else Carrier.GRPC
                self._puller = Puller(self._config, known, device, place, nixl=nixl, tls=self._tls)
        logger.info("kv carrier: %s", self._carrier)

    def _agent(self) -> NixlAgent | None:
        """The agent for KV in host memory; device memory has its own."""
        if self._config.memory == "device":
            return None
        return agent_for(self._config.carrier, encrypted=self._tls is not None)

    def endpoint(self) -> KvEndpoint | None:
        """Return the endpoint of this worker's leases; None on the decode side."""
        return None if self._holder is None else self._holder.endpoint

    @property
    def address(self) -> str | None:
        """`host:port` of this worker's KV port; None on the decode side."""
        return None if self._holder is None else self._holder.endpoint.address

    @property
    def carrier(self) -> Carrier:
        """The best carrier that this worker has."""
        return self._carrier

    def start_pulls(self, orders: Orders) -> None:
        """Start this step's pulls."""
        if self._puller is not None:
            self._puller.start_pulls(orders)

    def stage(self, layer_name: str, orders: Orders) -> None:
        """Copy one layer's new tokens of every staged request."""
        if self._holder is not None:
            self._holder.stage(layer_name, orders)

    def finish_step(self, orders: Orders) -> None:
        """Note what has ended, without waiting."""
        if self._holder is not None:
            self._holder.finish_step(orders)

    def take_results(self, aborted: set[str]) -> KVConnectorTransferResults:
        """Return the pulls that have ended; cancel those of aborted requests."""
        if self._puller is None:
            return KVConnectorTransferResults()
        return self._puller.take_results(aborted)

    def take_pull_times(self) -> PullTimes | None:
        """Return the times of the pulls that have ended, once."""
        return None if self._puller is None else self._puller.take_pull_times()

    def stop(self) -> None:
        """Stop serving and pulling."""
        for side in (self._holder, self._puller):
            if side is not None:
                side.stop()


@contextmanager
def _any_core() -> Iterator[None]:
    """Let threads made inside run on any core, not on the worker's compute core."""
    bound = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, bound)
