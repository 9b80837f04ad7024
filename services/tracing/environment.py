"""Reads OpenTelemetry's standard variables, and makes the tracer of this process.

    OTEL_EXPORTER_OTLP_ENDPOINT=http://collector:4317    turns tracing on
    OTEL_TRACES_SAMPLER=parentbased_traceidratio         which requests are traced, and so on

Without an endpoint, nothing of OpenTelemetry is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec

from ..core.errors import InvalidConfiguration
from ..core.request_spans import NoTracer, Tracer

ENDPOINT, TRACES_ENDPOINT = "OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"
EXPORTER, DISABLED = "OTEL_TRACES_EXPORTER", "OTEL_SDK_DISABLED"
PROTOCOL, TRACES_PROTOCOL = "OTEL_EXPORTER_OTLP_PROTOCOL", "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL"
PROTOCOLS = ("grpc", "http/protobuf")
_EXPORTERS = {"grpc": "proto.grpc", "http/protobuf": "proto.http"}


def is_tracing_on(environment: Mapping[str, str]) -> bool:
    """Return True if the variables name an OTLP endpoint and do not switch tracing off.

    Raises InvalidConfiguration for an exporter that is not supported.
    """
    if environment.get(DISABLED, "").lower() == "true":
        return False
    exporter = environment.get(EXPORTER, "otlp")
    if exporter not in ("otlp", "none"):
        raise InvalidConfiguration(f"{EXPORTER} ({exporter}) must be otlp or none")
    has_endpoint = environment.get(TRACES_ENDPOINT) or environment.get(ENDPOINT)
    return exporter == "otlp" and bool(has_endpoint)


def export_protocol(environment: Mapping[str, str]) -> str:
    """Return how spans are sent. Raises InvalidConfiguration for an unknown protocol."""
    given = environment.get(TRACES_PROTOCOL) or environment.get(PROTOCOL) or PROTOCOLS[0]
    if given not in PROTOCOLS:
        raise InvalidConfiguration(f"{PROTOCOL} ({given}) must be one of {', '.join(PROTOCOLS)}")
    return given


def tracer_for(role: str, environment: Mapping[str, str]) -> Tracer:
    """Return the tracer of a process with this role: `gateway`, `speculator`, `prefill`, `decode`.

    Raises InvalidConfiguration for variables of no meaning, or where the extra `otel` is needed and
    not installed.
    """
    if not is_tracing_on(environment):
        return NoTracer()
    protocol = export_protocol(environment)
    _require(f"opentelemetry.exporter.otlp.{_EXPORTERS[protocol]}")
    from .otel import OtelTracer  # only now: without tracing, a node needs none of it

    return OtelTracer(role, protocol)


def _require(module: str) -> None:
    try:
        found = find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise InvalidConfiguration(
            f"{ENDPOINT} is set, but {module} is not installed: pip install 'specprefill[otel]'"
        )
