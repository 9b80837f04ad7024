"""`grpc.health.v1`, which Kubernetes' probes and Envoy speak. Needs no API key."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse, HealthListResponse

from ..openai.access import RequestLimit
from ..pools.health import PoolCounts, judge

SERVICE = "specprefill.v1.SpecPrefill"
_PERIOD_S = 1.0  # between two polls of the pools, for those who watch


class GrpcHealth:
    """SERVING while prompts can be answered, and the gateway takes new ones."""

    def __init__(self, count: PoolCounts, limit: RequestLimit) -> None:
        self._count = count
        self._limit = limit

    async def check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """Return the state now; a service that is not ours is SERVICE_UNKNOWN."""
        if request.service not in ("", SERVICE):
            return HealthCheckResponse(status=HealthCheckResponse.SERVICE_UNKNOWN)
        if self._limit.draining or not judge(await self._count()).serving:
            return HealthCheckResponse(status=HealthCheckResponse.NOT_SERVING)
        return HealthCheckResponse(status=HealthCheckResponse.SERVING)

    async def watch(self, request: HealthCheckRequest) -> AsyncGenerator[HealthCheckResponse, None]:
        """Stream the state now, and each change."""
        last: HealthCheckResponse | None = None
        while True:
            now = await self.check(request)
            if now != last:
                last = now
                yield now
            await asyncio.sleep(_PERIOD_S)

    async def list(self) -> HealthListResponse:
        """Return the state of every service."""
        state = await self.check(HealthCheckRequest())
        return HealthListResponse(statuses={"": state, SERVICE: state})
