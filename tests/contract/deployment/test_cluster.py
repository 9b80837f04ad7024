"""Warnings about an open Ray cluster, and errors of one that does not start."""

import os
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from specprefill.deployment.front import FILE_VARIABLE
from specprefill.deployment.local_ray import SHORT_PATHS, LocalRay, StartFailed, answers_strangers


def test_a_cluster_that_answers_without_a_token_is_warned_of():
    class Dashboard(BaseHTTPRequestHandler):
        status = 200

        def do_GET(self):
            self.send_response(self.status)
            self.end_headers()

        def log_message(self, *_args):
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Dashboard) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        assert "answers without a token" in answers_strangers(url)
        Dashboard.status = 401
        assert answers_strangers(url) is None
        server.shutdown()
    assert answers_strangers(url) is None  # nobody is there: the deployment will report it


def test_a_ray_that_does_not_start_is_one_clear_sentence(monkeypatch):
    import ray

    def init(**_options):
        raise RuntimeError("The node was not started within 60 s.\nTraceback and so on")

    monkeypatch.setattr(ray, "init", init)
    for name in ("RAY_AUTH_MODE", *SHORT_PATHS):
        monkeypatch.setenv(name, "token" if name == "RAY_AUTH_MODE" else "1")
    before = dict(os.environ)
    with pytest.raises(StartFailed, match=r"did not start on this machine: The node was not"):
        LocalRay().start()
    assert dict(os.environ) == before


def test_a_gateway_that_does_not_answer_in_time_counts_as_holding_a_request(monkeypatch):
    import ray
    from ray.exceptions import GetTimeoutError

    class Actor:
        def __init__(self, name, namespace):
            if name == "gone":
                raise ValueError(f"no actor {name}")
            self.get_num_ongoing_requests = SimpleNamespace(remote=lambda: name)

    def get(name, timeout):
        if name == "busy":
            raise GetTimeoutError("10 s")
        return 2

    monkeypatch.setattr(ray, "get_actor", Actor)
    monkeypatch.setattr(ray, "get", get)
    assert LocalRay().count_requests(["gone", "answers", "busy"]) == 3


def test_a_start_that_ended_while_ray_was_imported_leaves_nothing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    before = dict(os.environ)
    local = LocalRay()
    with pytest.raises(ImportError):
        local.start()
    folder = local._folder
    assert folder.exists()
    local.close()
    assert not folder.exists()
    assert dict(os.environ) == before


def test_a_node_serves_its_own_file_whatever_the_environment_names(monkeypatch, tmp_path):
    """Two services of one process or shell: each front reads the file it was started with."""
    import ray

    seen = []

    def init(**_options):
        seen.append((os.environ[FILE_VARIABLE], os.environ["RAY_SERVE_HAPROXY_CONFIG_FILE_LOC"]))
        raise RuntimeError("enough")

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setenv(FILE_VARIABLE, "/another/service.yaml")
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    for file in (tmp_path / "a.yaml", tmp_path / "b.yaml", None):
        with pytest.raises(StartFailed):
            LocalRay(file=file).start()
    files, configurations = zip(*seen, strict=True)
    assert files == (str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml"), "")
    assert len(set(configurations)) == 3
    assert os.environ[FILE_VARIABLE] == "/another/service.yaml"
