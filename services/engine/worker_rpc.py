"""The calls that the services make to an engine's workers over vLLM's `collective_rpc`."""

from __future__ import annotations

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group

from ..core.types import Carrier


class KvRpc:
    """Methods of every worker class, on either device."""

    def kv_address(self) -> str | None:
        """Return the address of this worker's KV port; None where no KV is handed over from."""
        if not has_kv_transfer_group():
            return None
        address: str | None = get_kv_transfer_group().kv_address
        return address

    def kv_carrier(self) -> str:
        """Return the best carrier that this worker has."""
        if not has_kv_transfer_group():
            return Carrier.GRPC
        carrier: str = get_kv_transfer_group().kv_carrier
        return carrier
