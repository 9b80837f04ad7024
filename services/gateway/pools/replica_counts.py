"""Counts each pool's healthy replicas, from Serve's controller."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.schema import ServeStatus

logger = logging.getLogger(__name__)

# States of replicas that gateways send calls to: also while a node is drained, and while the
# controller comes back.
_RUNNING = ("RUNNING", "PENDING_MIGRATION", "RECOVERING")
_MAX_AGE_S = 1.0  # asking the controller more often returns nothing new
AFRESH_S = 2.0  # for an answer that a request waits for; one that lives answers in milliseconds


class ServeHealth:
    """Counts running replicas; remembers the counts for a second.

    Serve names no deployment of an application that it builds anew, nor of one whose last build
    failed, while the replicas of the build before answer. The last counts hold until it does; a
    gateway that has none, since it started meanwhile, takes every pool to have one replica.
    """

    def __init__(
        self,
        app_name: str,
        pools: Mapping[str, str],  # pool -> deployment
        status: Callable[[], ServeStatus],
        now: Callable[[], float] = time.monotonic,
        patience_s: float = 0.25,
    ) -> None:
        self._app_name = app_name
        self._pools = pools
        self._status = status
        self._now = now
        self._patience_s = patience_s
        self._counts: Mapping[str, int] | None = None
        self._asked_s = -float("inf")
        self._reading: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1)  # never behind the work of requests

    async def count(self) -> Mapping[str, int]:
        """Return running replicas by pool. A slow controller delays only the first call."""
        if self._now() - self._asked_s >= _MAX_AGE_S:
            self._start_reading()
        if self._reading is not None:
            known = self._counts is not None
            await asyncio.wait([self._reading], timeout=self._patience_s if known else None)
            if self._counts is None:
                self._reading.result()  # raises why, where the controller did not answer
        return self._counts or dict.fromkeys(self._pools, 1)

    async def is_empty(self, pool: str) -> bool:
        """Return True if the pool is known to have no running replica.

        Waits for the controller only where the last count is 0, and older than a second.
        """
        if self._now() - self._asked_s >= _MAX_AGE_S:
            self._start_reading()
        if self._counts is None or self._counts[pool] > 0:
            return False
        return (await self.count())[pool] == 0

    async def count_afresh(self) -> Mapping[str, int] | None:
        """Count as `count`, from an answer that the controller gives after this call.

        From one before it where the controller is away or slow, or names no deployment; None where
        nothing was ever counted.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(AFRESH_S):
                if self._reading is not None:
                    await asyncio.wait([self._reading])
                await asyncio.wait([self._start_reading()])
        return self._counts

    def _start_reading(self) -> asyncio.Task[None]:
        """Ask the controller, unless it is being asked."""
        if self._reading is None or self._reading.done():
            self._asked_s = self._now()
            self._reading = asyncio.create_task(self._refresh())
        return self._reading

    async def _refresh(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            status = await loop.run_in_executor(self._thread, self._status)
        except (RayError, RayServeException) as error:
            if self._counts is None:
                raise
            logger.info("replica counts: %s", error)  # the controller is away: keep the last counts
            return
        self._counts = self._read(status) or self._counts

    def _read(self, status: ServeStatus) -> Mapping[str, int]:
        application = status.applications.get(self._app_name)
        if application is None or not application.deployments:
            return {}
        running = {
            name: sum(deployment.replica_states.get(state, 0) for state in _RUNNING)
            for name, deployment in application.deployments.items()
        }
        return {pool: running.get(name, 0) for pool, name in self._pools.items()}
