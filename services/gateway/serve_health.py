"""Each pool's healthy replicas, from Serve's controller."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping

from ray.serve.schema import ServeStatus

_MAX_AGE_S = 1.0  # asking the controller more often tells nothing new


class ServeHealth:
    """Counts running replicas; remembers the counts for a second."""

    def __init__(
        self,
        app_name: str,
        pools: Mapping[str, str],  # pool -> deployment
        status: Callable[[], ServeStatus],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._app_name = app_name
        self._pools = pools
        self._status = status
        self._now = now
        self._counts: Mapping[str, int] = {}
        self._asked_s = -float("inf")

    async def count(self) -> Mapping[str, int]:
        """Running replicas by pool."""
        if self._now() - self._asked_s >= _MAX_AGE_S:
            self._asked_s = self._now()
            self._counts = self._read(await asyncio.to_thread(self._status))
        return self._counts

    def _read(self, status: ServeStatus) -> Mapping[str, int]:
        application = status.applications.get(self._app_name)
        if application is None:
            return dict.fromkeys(self._pools, 0)
        running = {
            name: deployment.replica_states.get("RUNNING", 0)
            for name, deployment in application.deployments.items()
        }
        return {pool: running.get(name, 0) for pool, name in self._pools.items()}
