"""`specprefill serve`: a signal ends the start, and a drain outlasts a dashboard that is away."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import requests

from specprefill.cli import main as cli
from specprefill.cli import serve

LONG_S = 20.0  # waited in vain where a signal ends nothing


class LocalRay:
    """A local Ray cluster, which sets a handler of SIGTERM when it starts, as Ray does."""

    def __init__(self, signals, file):
        self.signals, self.held = signals, [0]
        self.dashboard_url = "http://nowhere"
        signals.ray = self

    def start(self):
        signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(number))
        self.signals.reach("ray")

    def count_requests(self, _actors):
        self.signals.reach("drain")
        return self.held.pop(0) if len(self.held) > 1 else self.held[0]

    def close(self):
        self.signals.reached.append("closed")


class Api:
    """Serve's REST API; `fails` holds what the next calls raise, None where one answers.

    `statuses`: of the application, one at a time; None: Serve's controller is away.
    """

    def __init__(self, signals=None, fails=(), statuses=("RUNNING",)):
        self.signals, self.fails, self.deployed = signals, list(fails), []
        self.statuses = list(statuses)

    def _answer(self):
        error = self.fails.pop(0) if self.fails else None
        if error is not None:
            raise error

    def deploy(self, raw):
        self._answer()
        self.deployed.append(raw)

    def wait_healthy(self, _timeout_s, _show):
        self.signals.reach("deployment")

    def deployed_applications(self):
        return {"applications": [{"name": "app"}]}

    def details(self):
        self._answer()
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        app = {"status": status, "message": "", "deployments": {}}
        return {"applications": {} if status is None else {"app": app}}


class Signals:
    """Sends itself `number` at one moment of `serve`, and notes which moments it reached."""

    def __init__(self, number, moment):
        self.number, self.moment, self.reached = number, moment, []
        self.ray = None

    def send(self):
        os.kill(os.getpid(), self.number)

    def reach(self, moment):
        self.reached.append(moment)
        if moment == self.moment:
            self.send()
            time.sleep(LONG_S)


@pytest.fixture
def start(monkeypatch, root, tmp_path):
    """Run `specprefill serve` with one signal at one moment; its exit code and the moments."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    check, checks = tmp_path / "check", []

    def run(number, moment):
        signals = Signals(number, moment)

        class Process(subprocess.Popen):
            def __init__(self, *args, **options):
                super().__init__(*args, **options)
                checks.append(self)

            def communicate(self, *args, **options):
                """Only now are the handlers set for certain."""
                if moment == "check":
                    threading.Timer(0.2, signals.send).start()
                return super().communicate(*args, **options)

        seconds = LONG_S if moment == "check" else 0
        check.write_text(f"#!/bin/sh\nexec sleep {seconds}\n")
        check.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(check))
        monkeypatch.setattr(subprocess, "Popen", Process)
        monkeypatch.setattr(serve, "port_in_use", lambda *_: False)
        monkeypatch.setattr(serve, "LocalRay", lambda file: LocalRay(signals, file))
        monkeypatch.setattr(serve, "ServeApi", lambda _url: Api(signals))
        monkeypatch.setattr(serve, "show_verdict", lambda *_: signals.send())
        return cli.main(["serve", str(root / "cluster" / "local.yaml")]), signals.reached

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)
    (ended,) = checks
    assert ended.returncode is not None  # it does not outlive the command


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("moment", "reached"),
    [
        ("ray", ["ray", "closed"]),
        ("check", ["ray", "closed"]),
        ("deployment", ["ray", "deployment", "closed"]),
    ],
)
def test_a_signal_ends_the_start(start, capsys, number, moment, reached):
    started_s = time.monotonic()
    assert start(number, moment) == (1, reached)
    assert time.monotonic() - started_s < LONG_S / 2
    printed = capsys.readouterr()
    assert printed.err == "specprefill: interrupted before the service was ready\n"
    assert printed.out.splitlines()[-1].endswith("] stopping")
    assert "not checked" not in printed.out


def test_a_signal_that_follows_does_not_interrupt_the_stop(start, capsys, monkeypatch):
    def close(ray):
        ray.signals.send()
        ray.signals.reached.append("closed")

    monkeypatch.setattr(LocalRay, "close", close)
    assert start(signal.SIGINT, "deployment") == (1, ["ray", "deployment", "closed"])
    assert "interrupted" in capsys.readouterr().err


def test_a_signal_ends_the_service_and_a_second_one_cuts_requests_off(start, capsys, monkeypatch):
    def held(ray, _actors):
        ray.signals.send()
        return 1

    monkeypatch.setattr(LocalRay, "count_requests", held)
    assert start(signal.SIGTERM, None) == (0, ["ray", "deployment", "closed"])
    *_, cut, stopping, stopped = capsys.readouterr().out.splitlines()
    assert cut.endswith("] cutting off the remaining requests")
    assert (stopping[-8:], stopped[-7:]) == ("stopping", "stopped")


DROPPED = requests.ConnectionError("Remote end closed connection")


def drain(api, held=(0,), timeout_s=10.0):
    """Drain; the lines shown after the first."""
    ray = LocalRay(Signals(signal.SIGTERM, None), None)
    ray.held = list(held)
    lines = []
    serve._drain(ray, api, timeout_s, threading.Event(), lines.append)
    return lines[1:]


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(serve, "DRAIN_POLL_S", 0.01)


def test_a_drain_outlasts_dropped_connections(quick):
    api = Api(fails=[DROPPED, None, DROPPED, None, DROPPED])
    assert drain(api, held=[2, 0]) == []
    assert len(api.deployed) == 1
    assert api.fails == []


def test_a_drain_waits_until_every_gateway_has_heard_of_it(quick):
    api = Api(statuses=[None, "DEPLOYING", "DEPLOYING", "RUNNING"])
    assert drain(api) == []
    assert api.statuses == ["RUNNING"]


def test_a_drain_ends_with_its_time_and_names_the_reason(quick):
    cut = "cutting off the remaining requests"
    silent = Api(fails=[DROPPED] * 1000)
    assert drain(silent, timeout_s=0.1) == [
        f"Ray's dashboard does not answer (Remote end closed connection): {cut}"
    ]
    assert drain(Api(fails=[DROPPED]), held=[1], timeout_s=0.1) == [cut]
