"""TLS that is configured is spoken, or nothing is."""

import pytest

from specprefill.config import GatewayConfig
from specprefill.core.errors import InvalidConfiguration
from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.deployment.front import read_settings, require_front

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


def test_an_invalid_edit_of_the_file_leaves_the_front_as_it_was(tmp_path, root, capsys):
    """Serve starts HAProxy again at every change of its replicas: it must not stop then."""
    deployment = tmp_path / "deployment.yaml"
    good = (root / "cluster" / "local.yaml").read_text()
    deployment.write_text(good)
    before = read_settings(tmp_path, str(deployment))
    deployment.write_text(good + "\nnot: [valid")
    after = read_settings(tmp_path, str(deployment))
    assert (after.front, after.request_timeout_s) == (before.front, before.request_timeout_s)
    assert bool(after.api_keys) == bool(before.api_keys)
    assert "the settings stay as they were" in capsys.readouterr().err


def test_an_invalid_file_stops_a_front_that_never_knew_a_better_one(tmp_path):
    (tmp_path / "deployment.yaml").write_text("not: [valid")
    with pytest.raises(InvalidFile):
        read_settings(tmp_path, str(tmp_path / "deployment.yaml"))
