"""KV held by a prefill replica's workers, as Serve metrics (`ray_specprefill_kv_*`)."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.serve import metrics

from ..core.rising import RisingTotal
from ..kv.leases import LeaseGauges

if TYPE_CHECKING:  # importing vLLM takes seconds
    from .idle import IdlePrefill
    from .service import PrefillService

_PERIOD_S = 1.0


@dataclass(frozen=True, slots=True)
class _Total:
    """A counter over one of the workers' totals."""

    name: str
    description: str
    of: Callable[[LeaseGauges], int]


_TOTALS = (
    _Total(
        "leases_opened_total",
        "Leases that were opened, one per prompt and worker",
        lambda worker: worker.opened_total,
    ),
    _Total(
        "leases_pulled_total",
        "Leases whose KV was streamed to its end",
        lambda worker: worker.pulled_total,
    ),
    _Total(
        "leases_released_total",
        "Leases that their holder released",
        lambda worker: worker.released_total,
    ),
    _Total(
        "lease_expired_total",
        "Leases that nobody pulled in time",
        lambda worker: worker.expired_total,
    ),
    _Total(
        "lease_dropped_total",
        "Leases dropped over the byte limit",
        lambda worker: worker.dropped_total,
    ),
    _Total(
        "stranded_bytes_total",
        "Bytes of expired leases",
        lambda worker: worker.stranded_bytes_total,
    ),
    _Total(
        "staged_bytes_total",
        "Bytes of KV that were laid under leases",
        lambda worker: worker.staged_bytes_total,
    ),
)


class KvGauges:
    """Reads the workers once a second, until cancelled. `make` is as `ray.serve.metrics`."""

    def __init__(self, service: PrefillService | IdlePrefill, make: Any = metrics) -> None:
        def gauge(name: str, description: str, *tags: str) -> Any:
            return make.Gauge(f"specprefill_kv_{name}", description=description, tag_keys=tags)

        self._service = service
        self._carrier = gauge("carrier", "1 for the fastest carrier that is offered", "carrier")
        self._bytes_held = gauge("bytes_held", "Bytes that wait to be pulled")
        self._limit = gauge(
            "limit_bytes", "Most bytes that may wait: `kv.max_held_bytes`, per worker"
        )
        self._leases = gauge("leases_held", "Leases that wait to be pulled")
        self._waiting = gauge(
            "waiting_for_room",
            "Prefills that wait until their KV has room; steadily above 0, decode pulls too slowly",
        )
        self._totals = [
            (total, RisingTotal(make.Counter(f"specprefill_kv_{total.name}", total.description)))
            for total in _TOTALS
        ]

    async def run(self) -> None:
        """Keep the metrics up to date. A dead engine is the health check's to report."""
        while True:  # Ray forgets a gauge that is not set again
            self.update(await self._service.gauges())
            await asyncio.sleep(_PERIOD_S)

    def update(self, ranks: list[LeaseGauges]) -> None:
        """Set the metrics. `ranks` lacks the workers that do not answer."""
        self._carrier.set(1.0, tags={"carrier": self._service.carrier})
        self._waiting.set(self._service.waiting_for_room)
        self._limit.set(self._service.max_held_bytes)
        self._bytes_held.set(sum(rank.bytes_held for rank in ranks))
        self._leases.set(sum(rank.leases for rank in ranks))
        if len(ranks) < len(self._service.kv_addresses):
            return  # a total without one of its parts would seem to have started anew
        for total, rising in self._totals:
            rising.follow(sum(total.of(rank) for rank in ranks))
