"""TLS that is configured is spoken, or nothing is."""

from pathlib import Path

import pytest

from specprefill.config import FrontTls, GatewayConfig
from specprefill.core.errors import InvalidConfiguration
from specprefill.deployment.checked_yaml import InvalidFile
from specprefill.deployment.front import read_settings, require_front
from specprefill.deployment.front_tls import copy_certificates
from tests.certificates import Authority

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


@pytest.fixture
def pki(tmp_path):
    return Authority(tmp_path / "pki").files(name="localhost")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "haproxy").mkdir()
    return tmp_path / "haproxy"


def served(pki, *, mutual=True):
    authority = {"client_authority": pki.authority} if mutual else {}
    return FrontTls(certificate=pki.certificate, key=pki.key, **authority)


def contents(folder):
    return {each.name: each.read_bytes() for each in folder.iterdir()}


@pytest.mark.parametrize("name", ["certificate", "key", "authority"])
def test_unusable_files_leave_the_copies_and_are_named(folder, pki, capsys, name):
    copy_certificates(folder, served(pki))
    before = contents(folder)
    assert set(before) == {"front.pem", "front-authority.pem"}
    Path(getattr(pki, name)).write_text("half of it")
    copy_certificates(folder, served(pki))
    assert contents(folder) == before
    message = capsys.readouterr().err
    assert f"gateway.front.tls.{name.replace('auth', 'client_auth')}" in message
    assert "the certificates stay as they were" in message


def test_a_renewed_certificate_replaces_its_copy(folder, pki, tmp_path):
    copy_certificates(folder, served(pki))
    renewed = Authority(tmp_path / "pki").files(name="localhost")
    copy_certificates(folder, served(renewed))
    after = contents(folder)
    assert after["front.pem"].startswith(Path(renewed.certificate).read_bytes())
    assert after["front-authority.pem"] == Path(renewed.authority).read_bytes()
    assert (folder / "front.pem").stat().st_mode & 0o777 == 0o600


def test_tls_that_is_turned_on_with_unusable_files_stops_the_front(folder, pki):
    """A copy from before TLS was turned off counts for nothing."""
    copy_certificates(folder, served(pki))
    copy_certificates(folder, None)
    Path(pki.key).write_text("half of it")
    with pytest.raises(InvalidConfiguration, match=r"gateway\.front\.tls\.key"):
        copy_certificates(folder, served(pki))


def test_an_unusable_client_authority_that_is_turned_on_stops_the_front(folder, pki):
    """Else clients without a certificate, or of an authority that was dropped, would be served."""
    copy_certificates(folder, served(pki))
    copy_certificates(folder, served(pki, mutual=False))
    Path(pki.authority).write_text("half of it")
    with pytest.raises(InvalidConfiguration, match="client_authority"):
        copy_certificates(folder, served(pki))


def test_copies_that_are_unusable_themselves_stop_the_front(folder, pki):
    copy_certificates(folder, served(pki))
    (folder / "front.pem").write_text("half of it")
    Path(pki.key).unlink()
    with pytest.raises(InvalidConfiguration, match=r"gateway\.front\.tls\.key"):
        copy_certificates(folder, served(pki))
