"""The prefill pool of a model whose KV cannot be handed over: decode engines do all the work."""

from __future__ import annotations

from collections.abc import AsyncGenerator

from ..core.errors import PrefillUnavailable
from ..core.types import Carrier, PrefillResult, Request, Selection, Ticket
from ..kv.leases import LeaseGauges


class IdlePrefill:
    """Takes the place of a PrefillService, without an engine."""

    carrier = Carrier.GRPC
    kv_addresses: tuple[str, ...] = ()
    waiting_for_room = 0
    max_held_bytes = 0
    is_dead = False
    _no_steps: tuple[Ticket, ...] = ()

    async def start(self) -> None:
        """Load nothing."""

    async def close(self) -> None:
        """Do nothing."""

    async def drain(self, timeout_s: float) -> bool:
        """Return True: nothing is held."""
        del timeout_s
        return True

    def prefix_cache_tokens(self) -> int:
        """Return 0: nothing is cached."""
        return 0

    async def release(self, ticket: Ticket) -> None:
        """Do nothing: there are no tickets."""

    async def gauges(self) -> list[LeaseGauges]:
        """Return none."""
        return []

    async def check_health(self) -> None:
        """Do nothing: there is no engine that could be dead."""

    async def steps(
        self, request: Request, selection: Selection, timeout_s: float
    ) -> AsyncGenerator[Ticket | PrefillResult]:
        """Raise PrefillUnavailable: gateways send no prompt here."""
        del request, selection, timeout_s
        for step in self._no_steps:
            yield step
        raise PrefillUnavailable("prefill: the model's KV cannot be handed over")
