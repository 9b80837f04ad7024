"""TLS that is configured is spoken, or nothing is."""

import pytest

from specprefill.config import GatewayConfig
from specprefill.errors import InvalidConfiguration
from specprefill.front import require_front

TLS = GatewayConfig.model_validate({"front": {"tls": {"certificate": "c", "key": "k"}}})
ALL = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_HAPROXY_BINARY_PATH": "/opt/venv/bin/specprefill-front",
    "SPECPREFILL_DEPLOYMENT_FILE": "/etc/specprefill/deployment.yaml",
}


def test_a_gateway_starts_behind_a_front_that_speaks_tls():
    require_front(TLS, ALL)
    require_front(GatewayConfig(), {})  # plaintext needs nothing


@pytest.mark.parametrize(
    "change",
    [
        {"RAY_SERVE_ENABLE_HA_PROXY": "0"},
        {"RAY_SERVE_HAPROXY_BINARY_PATH": "/usr/sbin/haproxy"},
        {"SPECPREFILL_DEPLOYMENT_FILE": ""},
    ],
)
def test_a_gateway_whose_front_would_speak_plaintext_does_not_start(change):
    with pytest.raises(InvalidConfiguration, match=next(iter(change))):
        require_front(TLS, {**ALL, **change})
