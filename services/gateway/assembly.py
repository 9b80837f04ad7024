"""A gateway with all its parts, from the deployment's configuration."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle
from vllm.tokenizers.registry import cached_tokenizer_from_config

from ..config import AppConfig
from ..control.from_config import (
    decode_caches,
    fallback,
    kv_block_tokens,
    local_prefill,
    net_gain,
    patience,
    planner,
    prompt_modes,
    selection_policy,
)
from ..control.gain import NetGain
from ..core.pipeline import Pipeline
from ..engine.support import support_elsewhere
from ..kv.rpc import KvPeers
from ..kv.tls import watch_tls
from ..tracing.environment import tracer_for
from .grpc.api import GrpcApi
from .grpc.health_service import GrpcHealth
from .observe.calibration import calibration
from .observe.key_usage import KeyUsage
from .observe.latencies import ClientLatencies
from .observe.load_gauges import LoadGauges
from .observe.metrics import PipelineMetrics, RequestMetrics
from .observe.scrape import ServiceMetrics
from .observe.shadowing import ShadowMetrics, ShadowSampler
from .observe.traced_pools import TracedPools
from .observe.traffic import ArrivalCounts, GatewayTraffic
from .observe.watched import LearningObserver, ObservedPipeline, Observer
from .openai.access import RequestLimit
from .openai.keys import read_keys
from .openai.request_json import JsonLimits
from .openai.server import build_client, build_explainer, build_http_app, front_config
from .openai.text_writer import PromptTextWriter
from .pools.admission_control import AdmissionControl
from .pools.draft_state import SelfTestWatch
from .pools.handles import Carried, ServeDecoder, ServePrefiller, ServeSpeculator
from .pools.health import GATEWAY
from .pools.replica_counts import ServeHealth
from .serve_internals import by_reference, health_check_period_s


class Gateway:
    """The pipeline over the pools, its HTTP and gRPC APIs, and what observes it."""

    def __init__(
        self,
        config: AppConfig,
        speculator: DeploymentHandle,
        prefill: DeploymentHandle,
        decode: DeploymentHandle,
    ) -> None:
        self._config = config
        counted = PipelineMetrics()
        self._keys = read_keys(self._config.gateway.api_keys, os.environ)
        self._limit = RequestLimit(self._config.gateway.max_concurrent_requests, counted.count_shed)
        self._tracer = tracer_for(GATEWAY, os.environ)
        context = serve.get_replica_context()
        pools = {
            GATEWAY: context.deployment,
            "speculator": speculator.deployment_name,
            "prefill": prefill.deployment_name,
            "decode": decode.deployment_name,
        }
        self._peers = KvPeers(watch_tls(self._config.kv.tls))
        self._health = ServeHealth(context.app_name, pools, serve.status)
        if (
            self._config.kv.carrier == "object_ref"
        ):  # over gRPC, Serve would keep the object references forever
            prefill, decode = by_reference(prefill), by_reference(decode)
        front = front_config(self._config)
        engines = self._config.prefill, self._config.decode
        support = support_elsewhere(front.model_config, self._config.model, *engines)
        carried: Carried = {}
        pool = ServeSpeculator(speculator, self._health.count_afresh, self._health.is_empty)
        self._self_test = SelfTestWatch(pool.self_test)
        held = decode_caches(self._config)
        gain = net_gain(self._config, hands_over=support.hands_over, decode_caches=held)
        traced = TracedPools(self._tracer)
        pipeline = Pipeline(
            speculator=traced.speculator(pool),
            prefiller=traced.prefiller(ServePrefiller(prefill, self._peers, carried)),
            decoder=traced.decoder(ServeDecoder(decode, carried)),
            patience=patience(self._config.speculator),
            fallback=fallback(self._config),
            on_unscored=gain.learn_unscored,
            overlap=self._config.kv.overlap,
            local=local_prefill(self._config.kv, gain.models, held, hands_over=support.hands_over),
            texts=PromptTextWriter(
                cached_tokenizer_from_config(front.model_config), self._config.selection.gap_mark
            ),
            max_model_len=int(front.model_config.max_model_len),
            recompute_below=self._config.selection.recompute_below,
        )
        self._admission = AdmissionControl(
            pipeline,
            self._config.gateway,
            gain.models,
            self._health.count,
            self._tracer,
            app_name=context.app_name,
            gateway=context.replica_id.unique_id,
            decode_seqs=self._config.decode.max_num_seqs or 0,
        )
        self._admission.start()
        load = LoadGauges(lambda: self._limit.held, self._admission.gate)
        self._load_gauges = asyncio.create_task(load.run())
        self._traffic, self._models = GatewayTraffic(), gain.models
        self._shadowing: ShadowSampler | None = None
        if self._config.quality.shadow_share > 0:
            self._shadowing = ShadowSampler(
                pipeline, self._config.quality, ShadowMetrics(), pipeline.max_model_len
            )
        observed = ObservedPipeline(self._admission.answerer, self._observers(counted, gain))
        live = traced.pipeline(observed)
        usage = KeyUsage().count if self._keys else None
        modes = prompt_modes(self._config.selection, support)
        rules = planner(self._config.selection, gain, self._self_test.is_unfit, modes)
        self._client = build_client(self._config, live, rules, usage, front)
        vocabulary = self._client.model_config.get_vocab_size()
        self._calibration = calibration(
            pipeline, gain.models, vocabulary, self._client.engine_tokens
        )
        self._calibration.start()
        if self._config.speculator.self_test:
            self._self_test.start()
        self.grpc = GrpcApi(
            self._client,
            build_explainer(self._config, self._client),
            self._config.model.served_names,
            self._keys,
            self._limit,
            self._health.count,
            max_message_bytes=self._config.gateway.max_body_bytes,
            json_limits=JsonLimits(self._config.gateway.max_request_items),
            tracer=self._tracer,
        )
        self.grpc_health = GrpcHealth(self._health.count, self._limit, health_check_period_s)

    def drain(self) -> None:
        """Take no more requests."""
        self._limit.drain()

    async def close(self) -> None:
        """End everything that runs beside the requests."""
        self._load_gauges.cancel()
        if self._shadowing is not None:
            await self._shadowing.close()
        await self._admission.close()
        await self._calibration.close()
        await self._self_test.close()
        await self._peers.close()

    async def http_app(self) -> Any:
        """Build the HTTP app."""
        return await build_http_app(
            self._config,
            self._client,
            self._health.count,
            self._keys,
            self._limit,
            ServiceMetrics(ray.nodes).text,
            lambda: self._self_test.facts_kept,
            self._tracer,
            under_serve=True,
        )

    def signals(self) -> dict[str, float]:
        """Return this gateway's signals for the autoscaling policy."""
        return self._traffic.signals(self._models.curves())

    def _observers(self, counted: PipelineMetrics, gain: NetGain) -> list[Observer]:
        policy = selection_policy(self._config.selection, kv_block_tokens(self._config.prefill))
        observers: list[Observer] = [
            ArrivalCounts(self._traffic, policy, time.monotonic),
            RequestMetrics(counted),
            ClientLatencies(self._config.model.served_name),
            LearningObserver(gain.learn),
        ]
        return observers if self._shadowing is None else [*observers, self._shadowing]
