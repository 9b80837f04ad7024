"""Every private name of Ray Serve that this package uses, checked when a gateway starts.

Serve has no public way to set them. Tried with the Ray that pyproject.toml pins.
"""

from __future__ import annotations

import contextvars
import hashlib
import inspect
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import ray
from pydantic import PrivateAttr
from ray import serve
from ray.serve import Application, Deployment
from ray.serve._private import default_impl
from ray.serve._private.config import DeploymentConfig
from ray.serve._private.constants import (
    DEFAULT_GRPC_SERVER_OPTIONS,
    RAY_SERVE_GRPC_MAX_MESSAGE_SIZE,
)
from ray.serve.context import ReplicaContext, _get_global_client, _set_request_context
from ray.serve.handle import DeploymentHandle

from .. import __version__
from ..core.errors import IncompatibleRay

_MAX_RECEIVED = "grpc.max_receive_message_length"


def check_serve() -> None:
    """Raises IncompatibleRay, naming what differs, unless Serve has every private name."""
    differences = list(_differences())
    if differences:
        raise IncompatibleRay(
            "ray: not the version that this was made for: " + "; ".join(differences)
        )


def http_host() -> str:
    """Return the host that Serve's `http_options` bind to."""
    return str(_get_global_client().http_config.host)


def health_check_period_s() -> float:
    """Return the seconds between two of Serve's health checks of this replica."""
    return float(serve.get_replica_context()._deployment_config.health_check_period_s)


def bind_grpc_with(add_address: Callable[[Any, str], None]) -> None:
    """Let `add_address(server, "host:port")` bind the gRPC ports that this process opens."""
    default_impl.add_grpc_address = add_address


def limit_received_bytes(max_bytes: int) -> None:
    """Make this process's gRPC servers refuse larger messages unread; Serve takes 2 GiB."""
    others = [option for option in DEFAULT_GRPC_SERVER_OPTIONS if option[0] != _MAX_RECEIVED]
    DEFAULT_GRPC_SERVER_OPTIONS[:] = [*others, (_MAX_RECEIVED, max_bytes)]


def are_received_bytes_limited() -> bool:
    """Return True if this process's gRPC servers have another limit than Serve's."""
    return (_MAX_RECEIVED, RAY_SERVE_GRPC_MAX_MESSAGE_SIZE) not in DEFAULT_GRPC_SERVER_OPTIONS


def by_reference(handle: DeploymentHandle) -> DeploymentHandle:
    """Return the pool by actor calls, whose arguments and results may hold object references."""
    return handle.options(_by_reference=True)


def call_alone(handle: DeploymentHandle, *messages: object) -> Any:
    """Call `handle.remote(*messages)` under an internal request id that no other call has.

    A handle call inherits the internal id of the request in whose context it is made, and a custom
    request router finds a waiting call by that id. The prompts of one HTTP request, or an attempt
    and its repetition, would share it: one of them would wait forever. Serve then no longer cancels
    the call together with the request: the caller cancels it.
    """
    context = contextvars.copy_context()
    context.run(_set_request_context, _internal_request_id=uuid.uuid4().hex)
    return context.run(handle.remote, *messages)


class _OwnVersion(DeploymentConfig):  # type: ignore[misc]
    """Options of a deployment whose version is its own.

    Serve replaces the replicas of a deployment whose version changes, and sets the same version for
    all deployments of a file's application: a digest of its `args` and `runtime_env`.
    """

    _own: str = PrivateAttr(default="")

    def to_proto_bytes(self) -> bytes:
        """Return what the controller gets."""
        self.version = self._own
        return bytes(super().to_proto_bytes())


def bind_versioned(deployment: Deployment, config_json: str, *pools: Application) -> Application:
    """Bind a deployment that is replaced when `config_json` or the runtime environment changes."""
    options = _OwnVersion.model_construct(**dict(deployment._deployment_config))
    options._own = _version(deployment, config_json)
    deployment = deployment.options()
    deployment._deployment_config = options
    return deployment.bind(config_json, *pools)


def _version(deployment: Deployment, config_json: str) -> str:
    environment = ray.get_runtime_context().runtime_env if ray.is_initialized() else {}
    replica = deployment.func_or_class
    parts = [__version__, f"{replica.__module__}.{replica.__qualname__}", config_json, environment]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _differences() -> Iterator[str]:
    yield from _parameters(default_impl.add_grpc_address, "grpc_server", "server_address")
    yield from _parameters(_set_request_context, "_internal_request_id")
    yield from _parameters(DeploymentHandle.options, "_by_reference")
    if "version" not in DeploymentConfig.model_fields:
        yield "DeploymentConfig has no version"
    if not hasattr(DeploymentConfig, "to_proto_bytes"):
        yield "DeploymentConfig has no to_proto_bytes"
    if "_deployment_config" not in ReplicaContext.__dataclass_fields__:
        yield "ReplicaContext has no _deployment_config"
    if "health_check_period_s" not in DeploymentConfig.model_fields:
        yield "DeploymentConfig has no health_check_period_s"
    if _MAX_RECEIVED not in dict(DEFAULT_GRPC_SERVER_OPTIONS):
        yield f"DEFAULT_GRPC_SERVER_OPTIONS has no {_MAX_RECEIVED}"


def _parameters(function: Callable[..., Any], *names: str) -> Iterator[str]:
    found = inspect.signature(function).parameters
    for name in names:
        if name not in found:
            yield f"{function.__qualname__} has no parameter {name}"
