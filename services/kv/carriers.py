"""Chooses a ticket's carrier: the best that the ticket offers and this process has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from ..core.types import Carrier, Ticket
from .frames import Frame
from .nixl.reads import NixlClient
from .pull import KvClient


class PullHandle(Protocol):
    """One lease being pulled."""

    def deliver_to(self, store: Callable[[Frame], None]) -> float:
        """Give every frame to `store`, a layer's in token order.

        Returns the seconds for which the KV was complete at the peer when its last frame came.
        Raises KvTransferError unless it came whole.
        """
        ...

    def cancel(self) -> None:
        """End the pull, from any thread."""
        ...


class PullClient(Protocol):
    """Starts pulls."""

    def pull(
        self, endpoint: str, ticket: Ticket, fingerprint: str, start: int, timeout_s: float
    ) -> PullHandle:
        """Start to pull the tokens from `start` on; fail after `timeout_s` without a message."""
        ...

    def close(self) -> None:
        """Close every connection; pulls under way fail."""
        ...


class KvPuller:
    """Pulls by NIXL where both sides have it, and over gRPC from everybody else."""

    def __init__(self, grpc: KvClient, nixl: NixlClient | None) -> None:
        self._grpc = grpc
        self._nixl = nixl

    def pull(
        self, endpoint: str, ticket: Ticket, fingerprint: str, start: int, timeout_s: float
    ) -> PullHandle:
        """Start to pull the tokens from `start` on."""
        if self._nixl is not None and ticket.carrier == Carrier.NIXL:
            return self._nixl.pull(endpoint, ticket, fingerprint, start, timeout_s)
        return self._grpc.pull(endpoint, ticket, fingerprint, start, timeout_s)

    def close(self) -> None:
        """Close every connection; pulls under way fail."""
        self._grpc.close()
        if self._nixl is not None:
            self._nixl.close()
