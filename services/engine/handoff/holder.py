"""The prefill side of a worker: copies KV out, into memory from which its keeper serves it."""

from __future__ import annotations

import torch
from vllm.utils.network_utils import get_ip

from ...kv.keeper_link import KeeperLink
from .caches import Caches
from .device import Device
from .device_memory import register_device_memory
from .orders import HandoffConfig, KvEndpoint, Orders, Stage
from .staging import Stager


class Holder:
    """Complete when it is made: its keeper listens, and it stages what it is ordered to."""

    def __init__(
        self, config: HandoffConfig, caches: Caches, device: Device, *, readers: int
    ) -> None:
        """Raises InvalidConfiguration or KvTransferError when nothing can be served."""
        self._caches = caches
        self._readers = readers
        self._shares_cores = device.shares_cores
        self._layers: list[int] = sorted(caches.by_layer)
        in_device = config.memory == "device"
        memory = device.device_buffer(config.max_held_bytes) if in_device else None
        self._keeper = KeeperLink(
            max_bytes=config.max_held_bytes,
            carrier=config.carrier,
            host=get_ip() if config.host is None else config.host,
            tls=None if config.tls is None else config.tls.model_dump(),
            lease_s=config.lease_s,
            fingerprint=caches.fingerprint,
            device=None if memory is None else register_device_memory(memory),
        )
        if memory is None:
            memory = torch.from_numpy(self._keeper.memory)
            device.page_lock(memory)
        self._stager = Stager(device, caches, self._keeper, config.staging_bytes, memory)
        self._endpoint = KvEndpoint(self._keeper.address, caches.fingerprint)

    @property
    def endpoint(self) -> KvEndpoint:
        """Address of this worker's KV port, and the layout of the KV that it serves."""
        return self._endpoint

    @property
    def carrier(self) -> str:
        """The best carrier that the keeper has."""
        return self._keeper.carrier

    def stage(self, layer_name: str, orders: Orders) -> None:
        """Copy one layer's new tokens of every staged request, from the registered cache.

        A layer may have another view of it: MLA's has no dimension of heads. A worker that nobody
        pulls from holds leases without KV: it announces as any other, and is not waited for.
        """
        layer = self._caches.layers[layer_name]
        for order in orders.stages:
            if order.start == 0 and layer == self._layers[0]:
                self._keeper.ask("open", order.lease.id, order.lease.secret)
            self._stage_tokens(order, layer)
            if layer == self._announced_layer(order):
                self._keeper.ask("announce", order.lease.id, order.tokens)

    def finish_step(self, orders: Orders) -> None:
        """Copy recurrent states, drop aborted leases, let issued ones age, after the last layer.

        Nothing is waited for: every gather runs before later writes, on their stream. Raises
        KvTransferError when the keeper is dead: the engine must not go on handing out tickets.
        """
        self._keeper.check()
        for order in orders.stages:
            self._stage_states(order)
            self._caches.forget(order.lease.id)
        for lease in orders.drops:
            self._keeper.ask("release", lease.id, lease.secret)
        for lease_id in orders.issued:
            self._keeper.ask("issue", lease_id)

    def stop(self) -> None:
        """Stop serving."""
        self._keeper.close()

    def _stage_tokens(self, order: Stage, layer: int) -> None:
        last_layer = layer == self._layers[-1] and not self._caches.states
        if self._readers > 0:
            self._stager.stage(order, layer, last_layer=last_layer)
        elif last_layer and order.is_last:
            self._keeper.ask("complete", order.lease.id)

    def _stage_states(self, order: Stage) -> None:
        """Copy every recurrent layer's state, once all tokens before it are computed."""
        if not order.is_last or self._readers == 0:
            return
        layers = list(self._caches.states)
        for layer in layers:
            self._stager.stage_state(order, layer, last_layer=layer == layers[-1])

    def _announced_layer(self, order: Stage) -> int | None:
        """Return the layer of a chunk at which the decode side may start to pull; None: later.

        From the first chunk on, KV moves as fast as it is computed. But the decode engine polls
        while it waits: of a prompt of one chunk it waits for half of that only, and where it polls
        on the cores that compute (a quarter of the time to first token), for the last chunk.
        """
        if order.start == 0 and order.is_last:
            return self._layers[len(self._layers) // 2]
        begins = order.is_last if self._shares_cores else order.start == 0
        return self._layers[0] if begins else None
