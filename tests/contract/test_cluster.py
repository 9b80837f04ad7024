"""What a Ray cluster reports: that it is open to strangers, or why it does not start."""

import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from specprefill.cluster import SHORT_PATHS, LocalRay, StartFailed, answers_strangers


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
    monkeypatch.setattr(os, "environ", dict(os.environ))
    with pytest.raises(StartFailed, match=r"did not start on this machine: The node was not"):
        LocalRay().start()
