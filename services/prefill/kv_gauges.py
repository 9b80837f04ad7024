"""KV held by a prefill replica's workers, as Serve metrics (`ray_specprefill_kv_*`)."""

from __future__ import annotations

import asyncio

from ray.serve import metrics

from ..kv.leases import LeaseGauges
from .idle import IdlePrefill
from .service import PrefillService

_PERIOD_S = 1.0


class KvGauges:
    """Reads the gauges once a second, until cancelled."""

    def __init__(self, service: PrefillService | IdlePrefill) -> None:
        self._service = service
        self._bytes_held = _gauge("bytes_held", "KV bytes waiting to be pulled")
        self._waiting = _gauge("waiting_for_room", "Prefills that wait until their KV has room")
        self._leases = _gauge("leases_held", "Leases waiting to be pulled")
        self._expired = _gauge("lease_expired_total", "Leases that nobody pulled in time")
        self._dropped = _gauge("lease_dropped_total", "Leases dropped over the byte cap")
        self._carrier = metrics.Gauge(
            "specprefill_kv_carrier",
            description="1 for the best carrier that this replica offers",
            tag_keys=("carrier",),
        )
        self._stranded = _gauge("stranded_bytes_total", "KV bytes of leases that expired")

    async def run(self) -> None:
        """Keep the metrics up to date. A dead engine is the health check's to report."""
        while True:  # Ray forgets a gauge that is not set again
            self._carrier.set(1.0, tags={"carrier": self._service.carrier})
            self._set(await self._service.gauges())
            await asyncio.sleep(_PERIOD_S)

    def _set(self, ranks: list[LeaseGauges]) -> None:
        self._waiting.set(self._service.waiting_for_room)
        self._bytes_held.set(sum(rank.bytes_held for rank in ranks))
        self._leases.set(sum(rank.leases for rank in ranks))
        self._expired.set(sum(rank.expired_total for rank in ranks))
        self._dropped.set(sum(rank.dropped_total for rank in ranks))
        self._stranded.set(sum(rank.stranded_bytes_total for rank in ranks))


def _gauge(name: str, description: str) -> metrics.Gauge:
    return metrics.Gauge(f"specprefill_kv_{name}", description=description)
