"""HAProxy's certificates, replaced while it runs: real files, sockets and handshakes."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import time
from pathlib import Path

import psutil
import pytest

from specprefill.core.errors import InvalidConfiguration
from specprefill.deployment.certificates import (
    CertificateFiles,
    CertificateWatch,
    CommandRefused,
    WatchOrder,
    admin_socket,
)
from tests.certificates import Authority
from tests.contract.fronts import HOST, running, serve_config

pytestmark = pytest.mark.timeout(120)
SECONDS = 20.0


@pytest.fixture
def authority(tmp_path) -> Authority:
    return Authority(tmp_path / "pki")


@pytest.fixture
def files(authority):
    return authority.files(name="localhost")


@pytest.fixture
def front(tmp_path, files):
    """HAProxy that wants clients' certificates, of the authority that signed its own."""
    tls = {
        "certificate": files.certificate, "key": files.key, "client_authority": files.authority,
    }  # fmt: skip
    with running(serve_config(tmp_path, [1], [2]), {"front": {"tls": tls}}) as front:
        yield front


def client_context(files):
    context = ssl.create_default_context(cafile=files.authority)
    context.load_cert_chain(files.certificate, files.key)
    return context


def connect(front, context):
    plain = socket.create_connection((HOST, front.http_port), timeout=10)
    return context.wrap_socket(plain, server_hostname="localhost")


def healthy(connection):
    """The status line of HAProxy's own health check over this connection."""
    connection.sendall(b"GET /-/healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    return connection.recv(1 << 16).splitlines()[0]


def shown(front, context):
    with connect(front, context) as connection:
        healthy(connection)  # TLS 1.3: a refused client learns of it with the first answer
        return connection.getpeercert(binary_form=True)


def until(condition):
    give_up_s = time.monotonic() + SECONDS
    while not condition():
        assert time.monotonic() < give_up_s
        time.sleep(0.1)


def der(path):
    return ssl.PEM_cert_to_DER_cert(Path(path).read_text())


def test_a_renewed_certificate_is_shown_and_old_connections_go_on(front, authority, files):
    context = client_context(files)
    first = der(files.certificate)
    with connect(front, context) as old:
        healthy(old)
        assert shown(front, context) == first
        authority.files(name="localhost")  # renewed: the same paths and authority
        until(lambda: shown(front, context) == der(files.certificate) != first)
        assert b"HTTP/1.1" in healthy(old)
        assert old.getpeercert(binary_form=True) == first
    assert psutil.pid_exists(front.pid)


def test_another_authority_replaces_who_may_connect(front, files, tmp_path):
    old = client_context(files)
    assert shown(front, old) == der(files.certificate)
    Authority(tmp_path / "pki").files(name="localhost")  # a new authority signs everything

    def new_is_accepted():
        try:
            return shown(front, client_context(files)) == der(files.certificate)
        except (ssl.SSLError, ConnectionError):
            return False

    until(new_is_accepted)
    with pytest.raises((ssl.SSLError, ConnectionError)):
        shown(front, old)


def test_the_watch_ends_with_haproxy(front):
    (watch,) = psutil.Process(front.pid).children()
    os.kill(front.pid, signal.SIGKILL)
    watch.wait(timeout=SECONDS)


# --- the rule alone -------------------------------------------------------------------------


class Recorder:
    """Takes replacements, or refuses them; and log lines."""

    def __init__(self):
        self.replaced, self.lines, self.refuse = [], [], False

    def replace(self, kind, name, pem):
        if self.refuse:
            raise CommandRefused("not now")
        self.replaced.append((kind, name))


@pytest.fixture
def recorder():
    return Recorder()


@pytest.fixture
def watch(tmp_path, files, recorder):
    named = CertificateFiles(files.certificate, files.key, files.authority)
    copies = tmp_path / "front.pem", tmp_path / "authority.pem"
    copies[0].write_bytes(named.pem())
    copies[1].write_bytes(Path(files.authority).read_bytes())
    order = WatchOrder(named, *map(str, copies), socket="")
    return CertificateWatch(order, recorder.replace, recorder.lines.append)


def test_only_what_differs_is_replaced(watch, recorder, authority, tmp_path):
    watch.look()
    assert recorder.replaced == []
    authority.files(name="localhost")
    watch.look()
    watch.look()
    assert [kind for kind, _ in recorder.replaced] == ["ca-file", "cert"]
    assert recorder.replaced[-1] == ("cert", str(tmp_path / "front.pem"))


def test_the_copies_follow_so_that_a_restart_needs_no_files(watch, authority, files, tmp_path):
    renewed = authority.files(name="localhost")
    watch.look()
    copy = tmp_path / "front.pem"
    assert copy.read_text().startswith(Path(renewed.certificate).read_text())
    assert (tmp_path / "authority.pem").read_text() == Path(renewed.authority).read_text()
    assert copy.stat().st_mode & 0o777 == 0o600


def test_a_certificate_without_its_key_waits_for_it(watch, recorder, authority, files):
    old_key = Path(files.key).read_bytes()
    authority.files(name="localhost")
    new_key = Path(files.key).read_bytes()
    Path(files.key).write_bytes(old_key)
    watch.look()
    watch.look()
    assert recorder.replaced == []
    assert len(recorder.lines) == 1
    assert "mismatch" in recorder.lines[0]
    Path(files.key).write_bytes(new_key)
    watch.look()
    assert "cert" in dict(recorder.replaced)


def test_a_refused_replacement_is_tried_again(watch, recorder, authority, tmp_path):
    authority.files(name="localhost")
    before = (tmp_path / "front.pem").read_bytes()
    recorder.refuse = True
    watch.look()
    assert (tmp_path / "front.pem").read_bytes() == before
    assert recorder.lines == ["certificates stay as they are: not now"]
    recorder.refuse = False
    watch.look()
    assert "cert" in dict(recorder.replaced)


def test_a_configuration_without_an_admin_socket_is_refused():
    with pytest.raises(InvalidConfiguration, match="admin socket"):
        admin_socket("global\n    maxconn 10\n")
