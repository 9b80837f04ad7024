"""The result of the draft's self-test is read from the running service and explained."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import yaml

from specprefill.cli import draft_verdict
from specprefill.deployment.file import DeploymentFile, load, parse
from specprefill.deployment.local_ray import free_port

NOT_KNOWN = (503, b'{"status": "down", "speculator_self_test": null}')


@contextmanager
def answering(*answers: tuple[int, bytes]) -> Iterator[int]:
    """Answer `GET /health` with each answer in turn, then with the last one; yield the port."""
    left = list(answers)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = left.pop(0) if len(left) > 1 else left[0]
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(draft_verdict, "_POLL_S", 0.01)


def deployed(root: Path, port: int, **speculator: bool) -> DeploymentFile:
    """Return the shipped file with its HTTP on `port` of every address."""
    raw = load(root / "cluster" / "local.yaml").raw
    raw["http_options"] = {"host": "0.0.0.0", "port": port}
    raw["applications"][0]["args"]["speculator"].update(speculator)
    return parse(yaml.safe_dump(raw), "changed").file


def shown_for(file: DeploymentFile, stop: threading.Event | None = None) -> list[str]:
    shown: list[str] = []
    draft_verdict.show_verdict(file, stop or threading.Event(), shown.append)
    return shown


@pytest.mark.parametrize(
    ("share", "meaning"),
    [(b"1.0", "prompts are pruned where that pays"), (b"0.25", "fewer than 60%: it cannot choose")],
)
def test_the_result_is_waited_for_and_explained(root: Path, share: bytes, meaning: str) -> None:
    known = (200, b'{"status": "ok", "speculator_self_test": ' + share + b"}")
    with answering((502, b"no server"), NOT_KNOWN, known) as port:
        (line,) = shown_for(deployed(root, port))
    assert line.startswith(f"the speculator keeps {float(share):.0%} of the generated facts")
    assert meaning in line


def test_a_result_that_never_comes_points_to_the_log(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_verdict, "WAIT_S", 0.1)
    with answering(NOT_KNOWN) as port:
        (line,) = shown_for(deployed(root, port))
    assert "has no result: the speculator's log" in line


def test_nothing_is_waited_for_once_the_service_stops(root: Path) -> None:
    stop = threading.Event()
    stop.set()
    assert shown_for(deployed(root, free_port()), stop) == []


def test_a_test_that_is_switched_off_has_no_result(root: Path) -> None:
    assert shown_for(deployed(root, free_port(), self_test=False)) == []


def test_a_service_that_does_not_answer_has_none_yet() -> None:
    assert draft_verdict.read_self_test(f"http://127.0.0.1:{free_port()}/health") is None
