"""The gateway as a Serve ingress: one replica answers HTTP and gRPC."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from grpc_health.v1.health_pb2 import (
    HealthCheckRequest,
    HealthCheckResponse,
    HealthListRequest,
    HealthListResponse,
)
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from ..config import AppConfig
from ..core import heap
from ..core.replica_logging import log_with_serve
from ..deployment.file import DRAINING
from ..deployment.front import require_front
from ..rpc import specprefill_pb2 as pb
from .grpc.failed_calls import log_refusals_in_one_line
from .grpc.serve_ports import bind_grpc_as_http
from .serve_internals import check_serve, limit_received_bytes


class GatewayReplica:
    """Decorate with `serve.ingress()`: the app is built in the replica, after the constructor.

    The constructor imports vLLM, which takes seconds: whoever builds the application need not.
    """

    async def __init__(  # type: ignore[misc]
        self,
        config_json: str,
        speculator: DeploymentHandle,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
    ) -> None:
        log_with_serve()
        check_serve()
        log_refusals_in_one_line()
        bind_grpc_as_http()
        config = AppConfig.model_validate_json(config_json)
        require_front(config.gateway, os.environ)
        limit_received_bytes(config.gateway.max_body_bytes)
        from .assembly import Gateway

        self._gateway = Gateway(config, speculator, prefill, decode)
        heap.freeze()

    def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Apply a changed `user_config`; Serve calls this in every gateway."""
        if user_config.get(DRAINING):
            self._gateway.drain()

    async def check_health(self) -> None:
        """Note that Serve asks, which it does until it replaces this gateway."""
        self._gateway.grpc_health.attend()

    async def __del__(self) -> None:
        await self._gateway.close()

    async def __serve_build_asgi_app__(self) -> Any:
        """Build the HTTP app; Serve calls this after the constructor."""
        return await self._gateway.http_app()

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return this gateway's signals for the autoscaling policy."""
        return self._gateway.signals()

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        """See the proto."""
        return await self._gateway.grpc.generate(request, grpc_context)

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[pb.GenerateChunk]:
        """See the proto."""
        async with aclosing(self._gateway.grpc.generate_stream(request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Score(
        self, request: pb.ScoreRequest, grpc_context: RayServegRPCContext
    ) -> pb.ScoreResponse:
        """See the proto."""
        return await self._gateway.grpc.score(request, grpc_context)

    async def Health(
        self, request: pb.HealthRequest, grpc_context: RayServegRPCContext
    ) -> pb.HealthResponse:
        """See the proto."""
        return await self._gateway.grpc.health(request, grpc_context)

    async def Check(self, request: HealthCheckRequest) -> HealthCheckResponse:
        """See `grpc.health.v1.Health`."""
        return await self._gateway.grpc_health.check(request)

    async def Watch(
        self, request: HealthCheckRequest, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[HealthCheckResponse]:
        """See `grpc.health.v1.Health`."""
        async with aclosing(self._gateway.grpc_health.watch(request, grpc_context)) as changes:
            async for change in changes:
                yield change

    async def List(self, request: HealthListRequest) -> HealthListResponse:
        """See `grpc.health.v1.Health`."""
        del request
        return await self._gateway.grpc_health.list()
