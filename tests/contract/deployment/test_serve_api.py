"""What a dashboard's refusals and failures become, over real HTTP."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import ray
import yaml
from ray.dashboard.modules import dashboard_sdk
from ray.exceptions import AuthenticationError

from specprefill.cli import main as cli
from specprefill.cli import serve
from specprefill.deployment.serve_api import ServeApi, TokenRefused

NOTHING = {"applications": {}}
AWAY = 503


@pytest.fixture
def dashboard():
    """Its URL, and the statuses of the next answers; 200 after those."""
    statuses = []

    class Dashboard(BaseHTTPRequestHandler):
        def do_GET(self):
            status = statuses.pop(0) if statuses else 200
            answer = {"ray_version": ray.__version__} if "version" in self.path else NOTHING
            self.rfile.read(int(self.headers.get("content-length", 0)))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode() if status == 200 else b"why\nExc: this")

        def do_PUT(self):
            self.do_GET()

        def log_message(self, *_args):
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", statuses
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_token_is_named_by_every_call(dashboard, status):
    url, statuses = dashboard
    api = ServeApi(url)
    calls = (lambda: ServeApi(url), api.details, api.exporters, lambda: api.deploy({}))
    for call in calls:
        statuses.append(status)
        with pytest.raises(TokenRefused, match="RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH") as raised:
            call()
        assert str(raised.value).startswith(f"{url}: Ray's token is missing or wrong")


def test_a_missing_token_is_named_before_any_call(dashboard, monkeypatch):
    def find(_headers):
        raise AuthenticationError("no token here")

    monkeypatch.setattr(dashboard_sdk, "get_auth_headers_if_auth_enabled", find)
    with pytest.raises(TokenRefused, match="RAY_AUTH_TOKEN"):
        ServeApi(dashboard[0])


def test_commands_report_a_refused_token_in_one_line(dashboard, root, capsys, monkeypatch):
    url, statuses = dashboard
    monkeypatch.setattr(serve, "_report", lambda *_args, **_options: None)  # of the models
    monkeypatch.setattr(serve, "answers_strangers", lambda _url: None)
    file = str(root / "cluster" / "local.yaml")
    for command in (["status"], ["status", "--watch"], ["deploy", file]):
        statuses.append(401)
        assert cli.main([*command, "--address", url]) == 1
        last = capsys.readouterr().err.splitlines()[-1]
        assert last.startswith(f"specprefill: {url}: Ray's token is missing or wrong")


@pytest.mark.parametrize(
    ("command", "code", "ports"),
    [
        (["check", "--no-models"], 0, "30000-31000, 40000-41000"),
        (["deploy", "--address", "http://127.0.0.1:1"], 1, "30000-31000, 40000-41000"),
        (["serve"], 2, "drawn from 12000-29999"),  # and refuses certificates that do not exist
    ],
)
def test_commands_warn_of_ports_that_tls_does_not_protect(
    command, code, ports, root, tmp_path, capsys, monkeypatch
):
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    raw["http_options"]["host"] = "0.0.0.0"
    tls = {"certificate": str(tmp_path / "none.crt"), "key": str(tmp_path / "none.key")}
    raw["applications"][0]["args"]["gateway"] = {"front": {"tls": tls}}
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(raw))
    monkeypatch.setattr(serve, "_report", lambda *_args, **_options: None)  # of the models
    monkeypatch.setattr(serve, "answers_strangers", lambda _url: None)
    assert cli.main([*command, str(file)]) == code
    (warning,) = (
        line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")
    )
    assert "http_options.host is 0.0.0.0" in warning
    assert ports in warning


def test_a_failure_of_the_dashboard_passes_and_a_refusal_does_not(dashboard):
    url, statuses = dashboard
    api = ServeApi(url)
    statuses.append(AWAY)
    with pytest.raises(ConnectionError, match=r"^status 503: Exc: this$"):
        api.details()
    assert api.details() == NOTHING
    statuses.append(400)
    with pytest.raises(RuntimeError, match="400"):
        api.deploy({})
