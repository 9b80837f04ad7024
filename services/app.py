"""The composition root: configuration in, a Ray Serve application out.

A deployment file names it (`import_path: specprefill.app:build`); Serve validates `args`
against `AppConfig` and calls `build` on the cluster. Serve reads `build`'s annotation as a
class, so this module must not postpone annotations.
"""

import os
from dataclasses import dataclass, field
from typing import Any

from ray import serve
from ray.serve.config import RequestRouterConfig

from .autoscaling.targets import autoscaling_config
from .config import AppConfig, EngineConfig, PoolScaling, SpeculatorConfig
from .decode.replica import DecodeReplica
from .engine.cpu_plugin import ENV_SWITCH
from .gateway.pools.prefix_router import PrefixRouter
from .gateway.replica import GatewayReplica
from .gateway.serve_internals import bind_versioned
from .prefill.replica import PrefillReplica
from .speculator.replica import SpeculatorReplica

DRAIN_MARGIN_S = 10.0  # beyond the longest request
HEALTH_CHECK_PERIOD_S = 3.0
HEALTH_CHECK_TIMEOUT_S = 30.0  # a step of a long prefill may hold the engine that long
# No limit of Serve's: a gateway limits itself, answers in the right form, and stays healthy.
GATEWAY_ONGOING, GATEWAY_QUEUED = 1_000_000, -1


@dataclass(frozen=True, slots=True)
class Placement:
    """The resources of the cluster that one replica takes."""

    num_cpus: float = 1.0
    num_gpus: float = 0.0
    bundles: tuple[dict[str, float], ...] = field(default=())

    def options(self) -> dict[str, Any]:
        """Return the options of a Serve deployment."""
        actor: dict[str, Any] = {"num_cpus": self.num_cpus}
        if not self.bundles:
            return {"ray_actor_options": {**actor, "num_gpus": self.num_gpus}}
        return {
            "ray_actor_options": actor,  # the workers take the bundles' GPUs
            "placement_group_bundles": list(self.bundles),
            "placement_group_strategy": "PACK",
        }


def engine_placement(engine: EngineConfig, *, gpus: bool) -> Placement:
    """Place an engine's workers on one node, or in one bundle each where they may spread."""
    workers = engine.tensor_parallel_size * engine.pipeline_parallel_size
    spread = engine.executor == "ray" or (
        engine.executor == "auto" and gpus and engine.pipeline_parallel_size > 1
    )
    if spread and workers > 1:  # on CPUs too: vLLM finds Ray workers by the resource GPU
        return Placement(bundles=tuple({"CPU": 1.0, "GPU": 1.0} for _ in range(workers)))
    if not gpus:
        return Placement(num_cpus=float(engine.cpu_threads * workers))
    return Placement(num_gpus=float(workers))


def speculator_placement(speculator: SpeculatorConfig, *, gpus: bool) -> Placement:
    """Place the speculator on a GPU where there are any, unless it needs none."""
    if gpus and speculator.device != "cpu" and speculator.reads_with_model:
        return Placement(num_gpus=1.0)
    return Placement(num_cpus=float(speculator.threads))


@dataclass(frozen=True, slots=True)
class Replicas:
    """The classes that Serve makes the pools' replicas of."""

    speculator: type = SpeculatorReplica
    prefill: type = PrefillReplica
    decode: type = DecodeReplica


def build(args: AppConfig) -> serve.Application:
    """Build four deployments: Gateway (ingress), Speculator, Prefill, Decode."""
    return build_over(args, Replicas())


def build_over(args: AppConfig, replicas: Replicas) -> serve.Application:
    """Build them over other pools, such as those of a test."""
    gpus = os.environ.get(ENV_SWITCH) != "1"
    drain_s = args.gateway.request_timeout_s + DRAIN_MARGIN_S
    # A pool gets what it reads and no more: nothing else replaces its replicas when it changes.
    engines_json = args.for_engines().model_dump_json()
    speculator_json = args.for_speculators().model_dump_json()
    gateway_json = args.for_gateways().model_dump_json(exclude={"slo", "scaling"})

    def replica_options(name: str, bounds: PoolScaling) -> dict[str, Any]:
        if args.slo is None:
            return {"num_replicas": args.scaling.gateway_replicas} if name == "Gateway" else {}
        bounded = autoscaling_config(bounds.min_replicas, bounds.max_replicas)
        return {"autoscaling_config": bounded}

    def deployment_of(
        replica: type, name: str, ongoing: int, queued: int, place: Placement, bounds: PoolScaling
    ) -> Any:
        return serve.deployment(
            replica,
            name=name,
            max_ongoing_requests=ongoing,
            max_queued_requests=queued,
            graceful_shutdown_timeout_s=drain_s,
            graceful_shutdown_wait_loop_s=0.5,
            health_check_period_s=HEALTH_CHECK_PERIOD_S,
            health_check_timeout_s=HEALTH_CHECK_TIMEOUT_S,
            **place.options(),
            **replica_options(name, bounds),
        )

    by_prefix = RequestRouterConfig(request_router_class=PrefixRouter)
    speculator = deployment_of(
        replicas.speculator,
        "Speculator",
        args.speculator.max_queued + args.speculator.max_batch,  # its own queue is the bound
        args.speculator.max_queued,
        speculator_placement(args.speculator, gpus=gpus),
        args.scaling.speculator,
    ).options(request_router_config=by_prefix)
    prefill = deployment_of(
        replicas.prefill,
        "Prefill",
        args.prefill.max_ongoing_requests,
        args.prefill.max_queued_requests,
        engine_placement(args.prefill, gpus=gpus),
        args.scaling.prefill,
    ).options(request_router_config=by_prefix)
    decode = deployment_of(
        replicas.decode,
        "Decode",
        args.decode.max_ongoing_requests,
        args.decode.max_queued_requests,
        engine_placement(args.decode, gpus=gpus),
        args.scaling.decode,
    ).options(request_router_config=by_prefix)
    gateways = args.scaling.gateway_replicas
    gateway = deployment_of(
        serve.ingress()(GatewayReplica),
        "Gateway",
        GATEWAY_ONGOING,
        GATEWAY_QUEUED,
        Placement(),
        PoolScaling(min_replicas=gateways, max_replicas=gateways),  # so that it sends signals, too
    )
    return bind_versioned(
        gateway,
        gateway_json,
        bind_versioned(speculator, speculator_json),
        bind_versioned(prefill, engines_json),
        bind_versioned(decode, engines_json),
    )
