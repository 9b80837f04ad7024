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
def urls():
    """The addresses at which a dashboard was asked."""
    return []


@pytest.fixture
def dashboard(monkeypatch, urls):
    """The script of what each new client of the dashboard raises or answers."""
    script = []

    def connect(url):
        urls.append(url)
        answer = script.pop(0) if len(script) > 1 else script[0]
        if isinstance(answer, Exception):
            raise answer
        return SimpleNamespace(details=lambda: answer)

    context = SimpleNamespace(dashboard_url="127.0.0.1:1")
    runtime = SimpleNamespace(gcs_address="127.0.0.1:2", get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "init", lambda **_options: context)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: runtime)
    monkeypatch.setattr(drain, "begin_drain", lambda *_: None)
    monkeypatch.delenv("RAY_DASHBOARD_ADDRESS", raising=False)
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


@pytest.fixture
def worker(dashboard, monkeypatch):
    """A node whose head is another machine, with the dashboard on its loopback address."""
    runtime = SimpleNamespace(gcs_address="192.0.2.1:6379", get_node_id=lambda: "here")
    monkeypatch.setattr(ray, "get_runtime_context", lambda: runtime)
    return dashboard


def test_a_dashboard_that_only_the_head_reaches_ends_a_drain_before_it_starts(
    worker, urls, capsys, monkeypatch
):
    monkeypatch.setattr(drain, "begin_drain", lambda *_: pytest.fail("the drain has started"))
    worker.append(ConnectionError("refused"))
    assert cli.main(["drain", "--timeout", "1"]) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.endswith(
        "Ray's dashboard (127.0.0.1:1) answers only on the head (192.0.2.1:6379): start the head "
        "with --dashboard-host=0.0.0.0, or name a URL that this node reaches (--address, "
        "RAY_DASHBOARD_ADDRESS)"
    )
    assert (printed.out, urls) == ("", [])


@pytest.mark.parametrize("with_option", [True, False])
def test_a_dashboard_may_be_named(worker, urls, monkeypatch, with_option):
    worker.append(details())
    if not with_option:
        monkeypatch.setenv("RAY_DASHBOARD_ADDRESS", "http://head:8265")
    option = ["--address", "http://head:8265"] if with_option else []
    assert cli.main(["drain", *option]) == 0
    assert urls == ["http://head:8265"]


def test_the_dashboard_is_the_one_that_the_head_reports(dashboard, urls):
    dashboard.append(details())
    assert cli.main(["drain"]) == 0
    assert urls == ["http://127.0.0.1:1"]


def test_a_missing_token_is_one_line(monkeypatch, capsys):
    def refuse(**_options):
        raise AuthenticationError("no token")

    monkeypatch.setattr(ray, "init", refuse)
    assert cli.main(["drain"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "Ray's token is missing or wrong" in line
    assert "RAY_AUTH_TOKEN_PATH" in line
