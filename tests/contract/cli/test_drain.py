"""`specprefill drain` where Ray refuses or drops connections."""

from types import SimpleNamespace

import pytest
import ray
import requests
from ray.exceptions import AuthenticationError

from specprefill.cli import drain
from specprefill.cli import main as cli
from specprefill.deployment import node_drain

HERE = {"replica_id": "Decode#1", "node_id": "here"}


def details(*replicas):
    return {"applications": {"app": {"deployments": {"Decode": {"replicas": replicas}}}}}


@pytest.fixture
def dashboard(monkeypatch):
    """The script of what each new client of the dashboard raises or answers."""
    script = []

    def connect(_url):
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(details=lambda: answer)

    context = SimpleNamespace(dashboard_url="127.0.0.1:1")
    runtime = SimpleNamespace(gcs_address="127.0.0.1:2", get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "init", lambda **_options: context)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: runtime)
    monkeypatch.setattr(drain, "begin_drain", lambda *_: None)
    monkeypatch.setattr(drain, "ServeApi", connect)
    monkeypatch.setattr(node_drain, "POLL_S", 0.01)
    return script


def test_dropped_connections_do_not_end_a_drain(dashboard, capsys):
    dropped = requests.ConnectionError("Remote end closed connection")
    dashboard += [ConnectionError("refused"), details(HERE), dropped, details()]
    assert cli.main(["drain"]) == 0
    assert [line[10:] for line in capsys.readouterr().out.splitlines()] == [
        "draining node here",
        "waiting for Ray's dashboard, which does not answer",
        "waiting for Decode#1",
        "waiting for Ray's dashboard, which does not answer",
        "drained",
    ]


def test_a_drain_that_ends_with_its_time_fails(dashboard, capsys):
    dashboard.append(details(HERE))
    assert cli.main(["drain", "--timeout", "0.05"]) == 1
    assert "not drained in time; requests here will be cut off" in capsys.readouterr().out


def test_a_missing_token_is_one_line(monkeypatch, capsys):
    def refuse(**_options):
        raise AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    assert cli.main(["drain"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Ray's token is missing or wrong" in line
    assert "RAY_AUTH_TOKEN_PATH" in line
