"""OpenTelemetry's standard variables."""

import subprocess
import sys

import pytest

from specprefill.core.errors import InvalidConfiguration
from specprefill.core.request_spans import NoTracer
from specprefill.tracing.environment import is_tracing_on, tracer_for

ENDPOINT = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4317"}
TRACES_ENDPOINT = {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4317"}


@pytest.mark.parametrize(
    ("environment", "on"),
    [
        ({}, False),
        (ENDPOINT, True),
        (TRACES_ENDPOINT, True),
        ({**ENDPOINT, "OTEL_SDK_DISABLED": "true"}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "none"}, False),
        ({**ENDPOINT, "OTEL_TRACES_EXPORTER": "otlp"}, True),
        ({"OTEL_TRACES_EXPORTER": "otlp"}, False),
    ],
)
def test_an_endpoint_turns_tracing_on(environment, on):
    assert is_tracing_on(environment) is on


@pytest.mark.parametrize(
    ("name", "value"),
    [("OTEL_TRACES_EXPORTER", "zipkin"), ("OTEL_EXPORTER_OTLP_PROTOCOL", "http/json")],
)
def test_what_is_not_supported_is_refused_by_name(name, value):
    with pytest.raises(InvalidConfiguration, match=value):
        tracer_for("gateway", {**ENDPOINT, name: value})


def test_without_an_endpoint_nothing_is_traced():
    assert isinstance(tracer_for("gateway", {}), NoTracer)


def test_without_an_endpoint_no_sdk_is_imported():
    code = (
        "import sys; from specprefill.tracing.environment import tracer_for; tracer_for('x', {}); "
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setattr("specprefill.tracing.environment.find_spec", lambda _: None)
    with pytest.raises(InvalidConfiguration, match=r"specprefill\[otel\]"):
        tracer_for("gateway", ENDPOINT)
