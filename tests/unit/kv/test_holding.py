"""A lease held from afar: renewed while it is needed, released once, whatever happens."""

from __future__ import annotations

import asyncio

import pytest

from specprefill.core.errors import Unavailable
from specprefill.core.types import Lease, Ticket
from specprefill.kv.holding import hold_lease

TICKET = Ticket(Lease("lease", "secret"), ("peer:1",), "layout", 3)


class Leases:
    """Counts calls; `third` is set by the third renewal, `gone` by the release."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.renewed = self.released = 0
        self.third, self.gone = asyncio.Event(), asyncio.Event()
        self._fails = fails

    async def renew(self, ticket: Ticket) -> bool:
        self.renewed += 1
        if self.renewed == 3:
            self.third.set()
        return True

    async def release(self, ticket: Ticket) -> None:
        self.released += 1
        self.gone.set()
        if self._fails is not None:
            raise self._fails


async def test_a_lease_is_renewed_until_it_is_released():
    leases = Leases()
    async with asyncio.timeout(5), hold_lease(TICKET, leases, renew_s=0.001):
        await leases.third.wait()
        assert leases.released == 0
    assert leases.released == 1


async def test_a_lease_that_is_let_go_is_released_at_once_and_once():
    leases = Leases()
    async with asyncio.timeout(5), hold_lease(TICKET, leases) as done:
        done.set()
        await leases.gone.wait()
    assert (leases.renewed, leases.released) == (0, 1)


@pytest.mark.parametrize("failure", [ValueError("inside"), asyncio.CancelledError()])
async def test_a_failure_inside_releases_and_comes_out(failure):
    leases = Leases()

    async def use() -> None:
        async with hold_lease(TICKET, leases):
            raise failure

    outcome = (await asyncio.gather(use(), return_exceptions=True))[0]
    assert type(outcome) is type(failure)
    assert leases.released == 1


async def test_a_lease_that_cannot_be_released_does_not_fail_the_answer():
    leases = Leases(fails=Unavailable("peer is gone"))
    async with hold_lease(TICKET, leases):
        pass
    assert leases.released == 1
