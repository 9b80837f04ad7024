"""The Serve deployment file (`cluster/*.yaml`), checked before Serve sees it.

Serve ignores keys it does not know, so a typo would silently mean "the default". These
models mirror Serve's schema and refuse anything else, anywhere in the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from ..config import AppConfig, Strict, default_name, key_digest
from . import checked_yaml
from .gpu_counts import CPU_SWITCH, gpu_fault

Port = Annotated[int, Field(ge=0, le=65535)]
SLO_POLICY = "specprefill.autoscaling.policy:SloPolicy"
GATEWAY = "Gateway"
DRAINING = "draining"
DeploymentName = Literal["Gateway", "Speculator", "Prefill", "Decode"]


class RuntimeEnv(Strict):
    """The environment of a replica's processes."""

    env_vars: dict[str, str] = Field(default_factory=dict)
    working_dir: str | None = None
    py_modules: tuple[str, ...] | None = None
    pip: tuple[str, ...] | None = None
    image_uri: str | None = None


class ActorOptions(Strict):
    """The resources of a node that one replica takes."""

    num_cpus: NonNegativeFloat | None = None
    num_gpus: NonNegativeFloat | None = None  # of an engine on GPUs: one for each worker
    memory: NonNegativeFloat | None = None
    resources: dict[str, float] = Field(default_factory=dict)
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    runtime_env: RuntimeEnv = RuntimeEnv()


class PolicyReference(Strict):
    """An autoscaling policy by import path."""

    policy_function: str
    policy_kwargs: dict[str, Any] = Field(default_factory=dict)


class Autoscaling(Strict):
    """The rules by which Serve adds and removes replicas."""

    min_replicas: NonNegativeInt = 1
    initial_replicas: NonNegativeInt | None = None
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat | None = None
    metrics_interval_s: PositiveFloat | None = None
    look_back_period_s: PositiveFloat | None = None
    upscaling_factor: PositiveFloat | None = None
    downscaling_factor: PositiveFloat | None = None
    upscale_delay_s: NonNegativeFloat | None = None
    downscale_delay_s: NonNegativeFloat | None = None
    downscale_to_zero_delay_s: NonNegativeFloat | None = None
    aggregation_function: Literal["mean", "max", "min"] | None = None
    policy: PolicyReference | None = None


class RequestRouter(Strict):
    """The router that assigns requests to replicas."""

    request_router_class: str
    request_router_kwargs: dict[str, Any] = Field(default_factory=dict)
    request_routing_stats_period_s: PositiveFloat | None = None
    request_routing_stats_timeout_s: PositiveFloat | None = None


class Backpressure(Strict):
    """The HTTP response when the queue is full."""

    status_code: Literal[429, 503] = 503
    retry_after_s: NonNegativeInt | None = None


class Deployment(Strict):
    """One pool: its differences from the defaults in `app.py`."""

    name: DeploymentName
    num_replicas: PositiveInt | Literal["auto"] | None = None
    autoscaling_config: Autoscaling | None = None
    max_ongoing_requests: PositiveInt | None = None
    max_queued_requests: PositiveInt | None = None
    backpressure_config: Backpressure | None = None
    user_config: dict[str, Any] | None = None
    graceful_shutdown_wait_loop_s: NonNegativeFloat | None = None
    graceful_shutdown_timeout_s: NonNegativeFloat | None = None
    health_check_period_s: PositiveFloat | None = None
    health_check_timeout_s: PositiveFloat | None = None
    ray_actor_options: ActorOptions | None = None  # replaces the default as a whole, GPUs included
    placement_group_bundles: tuple[dict[str, float], ...] | None = None
    placement_group_strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] | None = (
        None
    )
    max_replicas_per_node: PositiveInt | None = None
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] | None = None
    rolling_update_percentage: Annotated[float, Field(gt=0, le=1)] | None = None
    request_router_config: RequestRouter | None = None

    @model_validator(mode="after")
    def _one_way_to_count_replicas(self) -> Deployment:
        if self.autoscaling_config is not None and isinstance(self.num_replicas, int):
            raise ValueError("must have num_replicas or autoscaling_config, not both")
        return self


class HttpOptions(Strict):
    """The address and limits of HTTP."""

    host: str = "127.0.0.1"
    port: Port = 8000
    root_path: str = ""
    request_timeout_s: PositiveFloat | None = None
    keep_alive_timeout_s: PositiveInt | None = None
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None


class GrpcOptions(Strict):
    """The port and limits of gRPC."""

    port: Port = 9000
    grpc_servicer_functions: tuple[
        Literal[
            "specprefill.gateway.grpc.serving.add_SpecPrefillServicer_to_server",
            "specprefill.rpc.specprefill_pb2_grpc.add_SpecPrefillServicer_to_server",
            "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server",
        ],
        ...,
    ] = ()
    request_timeout_s: PositiveFloat | None = None
    enable_reflection: bool = True


class ControllerEnv(Strict):
    """The environment of Serve's controller: Serve accepts nothing else."""

    env_vars: dict[str, str] = Field(default_factory=dict)


class ControllerOptions(Strict):
    """Options of Serve's controller."""

    runtime_env: ControllerEnv = ControllerEnv()


class Logging(Strict):
    """The logging of Serve's components."""

    encoding: Literal["TEXT", "JSON"] = "TEXT"
    log_level: int | str = "INFO"
    logs_dir: str | None = None
    enable_access_log: bool = True


class Application(Strict):
    """One model pair with its pools."""

    name: str
    route_prefix: str | None = "/"
    import_path: Literal["specprefill.app:build", "specprefill.mocker.application:build"]
    args: AppConfig
    runtime_env: RuntimeEnv = RuntimeEnv()
    deployments: tuple[Deployment, ...] = ()
    autoscaling_policy: PolicyReference | None = None
    logging_config: Logging | None = None
    external_scaler_enabled: bool = False

    @model_validator(mode="after")
    def _each_deployment_once(self) -> Application:
        names = [deployment.name for deployment in self.deployments]
        if len(set(names)) < len(names):
            raise ValueError("deployments: each name must occur only once")
        return self

    @model_validator(mode="after")
    def _gpus_for_engines(self) -> Application:
        """Refuse options that take the GPUs from an engine."""
        on_cpus = self.runtime_env.env_vars.get(CPU_SWITCH) == "1"
        if on_cpus or self.import_path != "specprefill.app:build":
            return self
        faults = []
        for each in self.deployments:
            options, bundles = each.ray_actor_options, each.placement_group_bundles
            if options is None and bundles is None:
                continue
            num_gpus = None if options is None else options.num_gpus
            has_options = options is not None
            fault = gpu_fault(self.args, each.name, num_gpus, bundles, has_options=has_options)
            faults.append(fault)
        if any(faults):
            raise ValueError(f"deployments: {'; '.join(filter(None, faults))}")
        return self

    @model_validator(mode="after")
    def _an_slo_and_its_policy(self) -> Application:
        """Require our policy with an SLO: Serve reads a policy for all pools from the file."""
        policy = self.autoscaling_policy
        ours = policy is not None and policy.policy_function == SLO_POLICY
        if (self.args.slo is not None) != ours:
            raise ValueError(
                f"args.slo and autoscaling_policy.policy_function {SLO_POLICY} must be set together"
            )
        if policy is None or not ours:
            return self
        if AppConfig.model_validate(policy.policy_kwargs.get("args")) != self.args:
            raise ValueError(
                "autoscaling_policy.policy_kwargs.args must equal the application's args"
            )
        return self

    @model_validator(mode="after")
    def _an_slo_sizes_pools(self) -> Application:
        """Refuse sizes beside an SLO: Serve would take them in place of the policy's bounds."""
        if self.args.slo is None:
            return self
        remedies = [
            f"in place of {key} of {each.name}, set {_BOUNDS[each.name]}"
            for each in self.deployments
            for key, value in (
                ("num_replicas", each.num_replicas),
                ("autoscaling_config", each.autoscaling_config),
            )
            if value is not None
        ]
        if remedies:
            raise ValueError(f"deployments: args.slo sizes every pool: {'; '.join(remedies)}")
        return self


_BOUNDS: dict[DeploymentName, str] = {
    "Gateway": "args.scaling.gateway_replicas",
    "Speculator": "args.scaling.speculator.min_replicas and max_replicas",
    "Prefill": "args.scaling.prefill.min_replicas and max_replicas",
    "Decode": "args.scaling.decode.min_replicas and max_replicas",
}


class DeploymentFile(Strict):
    """A whole file."""

    proxy_location: Literal["HeadOnly", "EveryNode", "Disabled"] = "EveryNode"
    http_options: HttpOptions = HttpOptions()
    grpc_options: GrpcOptions = GrpcOptions()
    controller_options: ControllerOptions | None = None
    logging_config: Logging | None = None
    applications: tuple[Application, ...]

    @model_validator(mode="after")
    def _each_application_once(self) -> DeploymentFile:
        names = [application.name for application in self.applications]
        routes = [application.route_prefix for application in self.applications]
        if not names:
            raise ValueError("applications: must hold at least one")
        if len(set(names)) < len(names) or len(set(routes)) < len(routes):
            raise ValueError("applications: each name and each route_prefix must occur only once")
        return self

    @model_validator(mode="after")
    def _one_front(self) -> DeploymentFile:
        """Refuse applications that need another HAProxy than the first: a node has one."""
        first, *others = self.applications
        wanted = _front_settings(first)
        for other in others:
            for key, value in _front_settings(other).items():
                if value != wanted[key]:
                    raise ValueError(
                        f"applications: args.gateway.{key} of {other.name} ({value}) must equal "
                        f"that of {first.name} ({wanted[key]}): one HAProxy serves both"
                    )
        return self


def _front_settings(application: Application) -> dict[str, Any]:
    """Return what HAProxy reads of an application, by key; of API keys, whether there are any."""
    gateway = application.args.gateway
    return {
        **{f"front.{key}": value for key, value in gateway.front.model_dump().items()},
        "request_timeout_s": gateway.request_timeout_s,
        "api_keys": "some" if gateway.api_keys else "none",
    }


@dataclass(frozen=True, slots=True)
class LoadedFile:
    """A valid file: as written, which is what Serve gets, and as typed values."""

    raw: dict[str, Any]
    file: DeploymentFile


def load(path: Path) -> LoadedFile:
    """Read and check a deployment file. Raises InvalidFile."""
    return parse(checked_yaml.read_text(path), str(path))


def parse(text: str, origin: str) -> LoadedFile:
    """Check the text of a deployment file; `origin` names it in messages. Raises InvalidFile."""
    raw = checked_yaml.parse_mapping(text, origin, "applications")
    return LoadedFile(raw, checked_yaml.validate(raw, origin, DeploymentFile))


def with_ports(raw: Mapping[str, Any], http_port: int, grpc_port: int) -> dict[str, Any]:
    """Return a copy of a file's content with other ports."""
    return {
        **raw,
        "http_options": {**raw.get("http_options", {}), "port": http_port},
        "grpc_options": {**raw.get("grpc_options", {}), "port": grpc_port},
    }


def without_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy with digests in place of API keys: Serve logs and shows the whole content."""
    return {**raw, "applications": [_without_keys(each) for each in raw["applications"]]}


def _without_keys(application: Mapping[str, Any]) -> dict[str, Any]:
    out = {**application, "args": _digest_keys(application["args"])}
    policy = application.get("autoscaling_policy") or {}
    given = policy.get("policy_kwargs", {})
    if "args" in given:
        digested = {**given, "args": _digest_keys(given["args"])}
        out["autoscaling_policy"] = {**policy, "policy_kwargs": digested}
    return out


def _digest_keys(args: Mapping[str, Any]) -> dict[str, Any]:
    gateway = args.get("gateway") or {}
    keys = [_digest_key(each, place) for place, each in enumerate(gateway.get("api_keys", ()))]
    return {**args, "gateway": {**gateway, "api_keys": keys}} if keys else dict(args)


def _digest_key(entry: str | Mapping[str, Any], place: int) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": default_name(place), "sha256": key_digest(entry)}
    if entry.get("key") is None:
        return dict(entry)
    return {"name": entry["name"], "sha256": key_digest(entry["key"])}


def with_draining_gateways(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy whose gateways take no new requests. Serve restarts none of them."""
    return {**raw, "applications": [_drain_gateway(each) for each in raw["applications"]]}


def _drain_gateway(application: Mapping[str, Any]) -> dict[str, Any]:
    given = list(application.get("deployments", []))
    others = [each for each in given if each["name"] != GATEWAY]
    gateway = next((each for each in given if each["name"] == GATEWAY), {"name": GATEWAY})
    draining = {**gateway, "user_config": {DRAINING: True}}
    return {**application, "deployments": [*others, draining]}
