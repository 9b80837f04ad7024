"""Gateways that share one gate within this process, with the messages of the real link."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from specprefill.control.admission import AdmissionPolicy
from specprefill.control.admitting import AdmissionGate
from specprefill.control.shared_gate import Admission, GateEntry, OpenRequests, SharedGate, View
from specprefill.core.wire import pack, unpack
from specprefill.gateway.pools.gate_client import GateLost, SharedAdmission


def shared_gate(policy: AdmissionPolicy, per_engine: int) -> SharedGate:
    """A gate in this loop's time."""
    now = asyncio.get_running_loop().time
    return SharedGate(policy, per_engine=per_engine, fair_keys=True, now=now)


class Link:
    """Calls a gate in this process; `lose` ends it, with every call that waits.

    While `drops` is set, messages without an answer are lost.
    """

    def __init__(self, gate: SharedGate) -> None:
        self._gate = gate
        self._lost = asyncio.Event()
        self.drops = False

    def lose(self) -> None:
        """The process that serves the gate is gone."""
        self._lost.set()

    async def enter(self, entry: GateEntry) -> Admission:
        """Wait for a slot, in a task of the gate's own: a caller that goes does not end it."""
        if self._lost.is_set():
            raise GateLost("gone")
        entering = asyncio.create_task(self._gate.enter(unpack(pack(entry), GateEntry)))
        lost = asyncio.create_task(self._lost.wait())
        try:
            await asyncio.wait([entering, lost], return_when=asyncio.FIRST_COMPLETED)
        finally:
            lost.cancel()
        if not entering.done():
            raise GateLost("gone")
        return unpack(pack(entering.result()), Admission)

    def leave(self, gateway: str, number: int, first_token: bool, by_itself: bool) -> None:
        """Give a slot back, or note a request's end."""
        if not self._lost.is_set() and not self.drops:
            self._gate.leave(gateway, number, first_token=first_token, by_itself=by_itself)

    async def renew(self, gateway: str, view: View, requests: OpenRequests) -> None:
        """Take a gateway's view, and its open requests."""
        if self._lost.is_set():
            raise GateLost("gone")
        sent = unpack(pack((view, requests)), tuple[View, OpenRequests])
        self._gate.renew(gateway, *sent)


@asynccontextmanager
async def connected(
    gate: SharedGate, own: AdmissionGate, name: int, view: View
) -> AsyncIterator[SharedAdmission]:
    """A gateway's admission, once it uses `gate`."""

    async def connect() -> Link:
        return Link(gate)

    now = asyncio.get_running_loop().time
    admission = SharedAdmission(connect, own, f"gateway {name}", lambda: view, now)
    admission.start()
    while not admission.is_shared:  # noqa: ASYNC110
        await asyncio.sleep(0.01)  # in virtual time
    try:
        yield admission
    finally:
        await admission.close()
