"""The Ray actor that serves the gate of all gateways, and the calls to it."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

import ray
import xxhash
from ray.exceptions import RayError

from ... import __version__
from ...config import AdmissionConfig
from ...control.admission import AdmissionPolicy
from ...control.shared_gate import Admission, GateEntry, OpenRequests, SharedGate, View
from ...core.wire import pack, unpack
from .gate_client import GateLost

ALONE_S = 60.0
_NAMESPACE = "specprefill"
_MAX_CALLS = 1 << 16  # of all gateways at a time; the gate's own bounds are lower


def admission_policy(admission: AdmissionConfig, ttft_s: float) -> AdmissionPolicy:
    """Return the rules of a deployment's admission."""
    return AdmissionPolicy(
        ttft_s,
        math.inf if admission.gap_s is None else admission.gap_s,
        max_waiting=admission.max_waiting,
        max_waiting_per_key=admission.max_waiting_per_key,
    )


class GateActor:
    """Serves one SharedGate. Messages are msgpack; see SharedGate."""

    def __init__(self, admission_json: str, ttft_s: float, fair_keys: bool) -> None:
        admission = AdmissionConfig.model_validate_json(admission_json)
        self._gate = SharedGate(
            admission_policy(admission, ttft_s),
            per_engine=admission.per_engine,
            fair_keys=fair_keys,
            now=time.monotonic,
        )

        self._heard_s = time.monotonic()
        self._watch: asyncio.Task[None] | None = None

    async def enter(self, payload: bytes) -> bytes:
        """Wait for a slot."""
        return pack(await self._gate.enter(unpack(payload, GateEntry)))

    async def leave(self, gateway: str, number: int, first_token: bool, by_itself: bool) -> None:
        """Give a slot back, or note a request's end."""
        self._gate.leave(gateway, number, first_token=first_token, by_itself=by_itself)

    async def renew(self, gateway: str, payload: bytes) -> None:
        """Take a gateway's view of the pools, and its open requests."""
        view, requests = unpack(payload, tuple[View, OpenRequests])
        self._heard_s = time.monotonic()
        if self._watch is None:
            self._watch = asyncio.create_task(self._end_when_alone())
        self._gate.renew(gateway, view, requests)

    async def _end_when_alone(self) -> None:
        """End this actor once no gateway has called for a while: nobody else does."""
        left_s = ALONE_S
        while left_s > 0.0:
            await asyncio.sleep(left_s)
            left_s = self._heard_s + ALONE_S - time.monotonic()
        ray.kill(ray.get_runtime_context().current_actor, no_restart=True)


class GateActorLink:
    """The calls to a GateActor. They raise GateLost when its process is gone."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    async def enter(self, entry: GateEntry) -> Admission:
        """See SharedGate.enter."""
        try:
            return unpack(await self._actor.enter.remote(pack(entry)), Admission)
        except RayError as error:
            raise GateLost(str(error)) from error

    def leave(self, gateway: str, number: int, first_token: bool, by_itself: bool) -> None:
        """See SharedGate.leave."""
        self._actor.leave.options(num_returns=0).remote(gateway, number, first_token, by_itself)

    async def renew(self, gateway: str, view: View, requests: OpenRequests) -> None:
        """See SharedGate.renew."""
        try:
            await self._actor.renew.remote(gateway, pack((view, requests)))
        except RayError as error:
            raise GateLost(str(error)) from error


async def connect_to_gate(
    app_name: str, admission: AdmissionConfig, ttft_s: float, fair_keys: bool
) -> GateActorLink:
    """Find the application's gate, or start it. Raises GateLost.

    Gateways of another configuration or version have a gate of their own during an upgrade. Ray
    starts the actor again when its process or node dies; it ends by itself once no gateway calls
    it.
    """
    given = admission.model_dump_json()
    version = xxhash.xxh3_64_hexdigest(f"{__version__} {given} {ttft_s} {fair_keys}".encode())
    options = {
        "name": f"gate-{app_name}-{version}",
        "namespace": _NAMESPACE,
        "get_if_exists": True,
        "lifetime": "detached",
        "max_restarts": -1,
        "num_cpus": 0,
        "max_concurrency": _MAX_CALLS,
    }
    try:
        make = ray.remote(GateActor).options(**options).remote
        actor = await asyncio.to_thread(make, given, ttft_s, fair_keys)
    except (RayError, ValueError) as error:  # ValueError: the name's owner is going
        raise GateLost(str(error)) from error
    return GateActorLink(actor)
