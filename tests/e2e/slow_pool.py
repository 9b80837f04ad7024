"""A deployment that answers as late as it is asked to. Ray imports this module on its nodes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from ray import serve


class Slow:
    """Streams two words, the second after a while."""

    async def __call__(self, seconds: float) -> AsyncIterator[str]:
        yield "started"
        await asyncio.sleep(seconds)
        yield "done"


def build() -> serve.Application:
    """One replica, on a node that has the resource `pool`."""
    return serve.deployment(
        Slow,
        num_replicas=1,
        ray_actor_options={"num_cpus": 0, "resources": {"pool": 1}},
        graceful_shutdown_timeout_s=30.0,
    ).bind()
