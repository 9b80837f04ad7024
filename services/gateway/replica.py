"""The gateway as a Serve ingress: one replica answers HTTP and gRPC."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.handle import DeploymentHandle

from .. import heap
from ..config import AppConfig
from ..kv.rpc import KvPeers
from ..kv.tls import read_tls
from ..pipeline import Pipeline
from ..policies import fallback, local_prefill, net_gain, patience, planner
from ..rpc import specprefill_pb2 as pb
from .admission import behind_gate
from .app import build_client, build_http_app
from .calibration import calibration
from .client import Answering
from .grpc_api import GrpcApi
from .health import GATEWAY
from .metrics import MeasuredPipeline, PipelineMetrics
from .pools import Carried, ServeDecoder, ServePrefiller, ServeSpeculator, by_reference
from .scrape import ServiceMetrics
from .self_test import SelfTestWatch
from .serve_health import ServeHealth
from .shadowing import ShadowedPipeline, ShadowMetrics
from .traffic import CountedPipeline, GatewayTraffic


class GatewayReplica:
    """Decorate with `serve.ingress()`: the app is built in the replica, after the constructor."""

    async def __init__(  # type: ignore[misc]
        self,
        config_json: str,
        speculator: DeploymentHandle,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
    ) -> None:
        self._config = AppConfig.model_validate_json(config_json)
        context = serve.get_replica_context()
        pools = {
            GATEWAY: context.deployment,
            "speculator": speculator.deployment_name,
            "prefill": prefill.deployment_name,
            "decode": decode.deployment_name,
        }
        self._peers = KvPeers(read_tls(self._config.kv.tls))
        self._health = ServeHealth(context.app_name, pools, serve.status)
        if self._config.kv.carrier == "object_ref":  # calls by gRPC would hold them for ever
            prefill, decode = by_reference(prefill), by_reference(decode)
        carried: Carried = {}
        pool = ServeSpeculator(speculator, self._health.count)
        self._self_test = SelfTestWatch(pool.self_test)
        gain = net_gain(self._config)
        pipeline = Pipeline(
            speculator=pool,
            prefiller=ServePrefiller(prefill, self._peers, carried),
            decoder=ServeDecoder(decode, carried),
            planner=planner(self._config.selection, gain, self._self_test.is_unfit),
            patience=patience(self._config.speculator),
            fallback=fallback(self._config),
            on_unscored=gain.learn_unscored,
            overlap=self._config.kv.overlap,
            local=local_prefill(self._config.kv, gain.models),
        )
        admitting = behind_gate(pipeline, self._config.gateway, gain.models, self._health.count)
        self._traffic, self._models = GatewayTraffic(), gain.models
        live: Answering = CountedPipeline(
            MeasuredPipeline(admitting, PipelineMetrics(), gain.learn),
            self._config.selection.min_kept_tokens,
            self._traffic,
            time.monotonic,
        )
        self._shadowed: ShadowedPipeline | None = None
        if self._config.quality.shadow_share > 0:
            live = self._shadowed = ShadowedPipeline(
                live, pipeline, self._config.quality, ShadowMetrics()
            )
        self._client = build_client(self._config, live)
        self._calibration = calibration(pipeline, gain.models, self._client.model_config)
        self._calibration.start()
        if self._config.speculator.self_test:
            self._self_test.start()
        self._grpc = GrpcApi(
            self._client,
            self._config.model.served_name,
            self._config.gateway.api_keys,
            self._health.count,
        )
        heap.freeze()

    async def __del__(self) -> None:
        if self._shadowed is not None:
            await self._shadowed.close()
        await self._calibration.close()
        await self._self_test.close()
        await self._peers.close()

    async def __serve_build_asgi_app__(self) -> Any:
        """Serve calls this after the constructor."""
        return await build_http_app(
            self._config, self._client, self._health.count, ServiceMetrics(ray.nodes).text
        )

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What the autoscaling policy is told of this gateway's requests."""
        return self._traffic.signals(self._models.curves())

    async def Generate(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> pb.GenerateResponse:
        """See the proto."""
        return await self._grpc.generate(request, grpc_context)

    async def GenerateStream(
        self, request: pb.GenerateRequest, grpc_context: RayServegRPCContext
    ) -> AsyncIterator[pb.GenerateChunk]:
        """See the proto."""
        async with aclosing(self._grpc.generate_stream(request, grpc_context)) as chunks:
            async for chunk in chunks:
                yield chunk

    async def Score(
        self, request: pb.ScoreRequest, grpc_context: RayServegRPCContext
    ) -> pb.ScoreResponse:
        """See the proto."""
        return await self._grpc.score(request, grpc_context)

    async def Health(
        self, request: pb.HealthRequest, grpc_context: RayServegRPCContext
    ) -> pb.HealthResponse:
        """See the proto."""
        return await self._grpc.health(request, grpc_context)
