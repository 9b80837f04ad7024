"""A gateway's share of the pools."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil


@dataclass(frozen=True, slots=True)
class GatewayShare:
    """This gateway's share of the engines: the replicas known to serve, and their gateways.

    A gateway that decides by itself takes an equal part of what the pools can do: a fraction of
    an engine where there are more gateways than engines.
    """

    speculators: int = 1
    prefills: int = 1
    gateways: int = 1
    decode_slots: int = 0  # sequences that all decode replicas run at once; 0: not known

    @property
    def speculator_share(self) -> float:
        """This gateway's part of the speculators, in replicas."""
        return max(1, self.speculators) / max(1, self.gateways)

    @property
    def prefill_share(self) -> float:
        """This gateway's part of the prefill engines, in replicas."""
        return max(1, self.prefills) / max(1, self.gateways)

    @property
    def decode_share(self) -> float:
        """This gateway's part of the decode slots; 0: not known."""
        return self.decode_slots / max(1, self.gateways)

    @property
    def prefill_speed(self) -> float:
        """The server-seconds per second that one prompt of this gateway gets in prefill.

        With a share below one engine it is unknown when this gateway's prompt runs: 0, the whole
        prompt counts until it is answered.
        """
        share = self.prefill_share
        return 0.0 if share < 1.0 else share / ceil(share)

    @property
    def prefills_at_once(self) -> int:
        """The number of this gateway's prompts that the prefill engines compute at a time."""
        return ceil(self.prefill_share)

    def slots(self, per_engine: int) -> float:
        """Return this gateway's part of the requests that may be before their first token."""
        return per_engine * max(1, self.speculators + self.prefills) / max(1, self.gateways)
