"""The real application on a real Ray, started once by the product's own command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from specprefill.deployment.file import load, with_ports
from specprefill.deployment.front import FILE_VARIABLE
from specprefill.deployment.local_ray import free_port, set_auth_mode
from specprefill.deployment.serve_api import ServeApi, Snapshot

from .collector import Collector

START_TIMEOUT_S = 300.0
EXPORT_S = 2.0  # how often Ray exports metrics; ten seconds unless it is set
PATIENCE_S = 240.0  # between two tokens: engines that start take all of the cores
DRAIN_S = 240.0  # streams end however slow they are
STOP_TIMEOUT_S = DRAIN_S + 90.0
SPECULATOR_TIMEOUT_S = 5.0  # longer than a dead replica is taken for a living one
BIN = Path(sys.executable).parent
KEEP = 0.2
POOLS = ("Speculator", "Prefill", "Decode")
STAGES = ("queue_s", "speculate_s", "prefill_s", "transfer_s", "first_decode_s", "ttft_s")


@dataclass
class App:
    """A running application and how to reach it."""

    file: Path
    http_port: int
    grpc_port: int
    dashboard_url: str
    pid: int  # of the command; everything else runs below it
    api: ServeApi = field(repr=False)

    @property
    def http_url(self) -> str:
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        return f"127.0.0.1:{self.grpc_port}"

    def wait_healthy(self) -> Snapshot:
        """Until every pool has all its replicas."""
        return self.api.wait_healthy(START_TIMEOUT_S, lambda _line: None)

    def redeploy(self, change: Callable[[dict], None]) -> None:
        """Edit the file with `change` and hand it to Ray's own `serve deploy`."""
        raw = yaml.safe_load(self.file.read_text())
        change(raw)
        self.file.write_text(yaml.safe_dump(raw))
        command([BIN / "serve", "deploy", self.file, "-a", self.dashboard_url])

    def front_config(self) -> str:
        """The configuration that HAProxy runs with."""
        for process in psutil.process_iter(["name", "cmdline"]):
            if process.info["name"] == "haproxy" and process.environ().get(FILE_VARIABLE) == str(
                self.file
            ):
                arguments = process.info["cmdline"]
                return Path(arguments[arguments.index("-f") + 1]).read_text()
        raise AssertionError("HAProxy does not run")

    def log(self, deployment: str) -> str:
        """What the running replicas of one pool have logged, one after the other."""
        return "".join(self.logs(deployment))

    def logs(self, deployment: str) -> list[str]:
        """What each running replica of one pool has logged."""
        paths = {
            file.path
            for pid in self.replica_pids(deployment)
            for file in psutil.Process(pid).open_files()
            if Path(file.path).name.startswith("replica_")
        }
        return [Path(path).read_text() for path in sorted(paths)]

    def session_logs(self) -> Path:
        """The folder of the Ray session's logs."""
        files = psutil.Process(self.replica_pids("Speculator")[0]).open_files()
        (path,) = {Path(file.path) for file in files if Path(file.path).name.startswith("replica_")}
        return path.parent.parent

    def replica_pids(self, deployment: str) -> list[int]:
        """The processes of one pool."""
        return self.api.replica_pids(deployment)


def command(argv, *, code=0) -> subprocess.CompletedProcess:
    """Run a program to its end and check its exit code."""
    outcome = subprocess.run(
        [str(part) for part in argv], capture_output=True, text=True, timeout=120, check=False
    )
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    return outcome


@pytest.fixture(scope="package")
def collector():
    """What the application exports its traces to."""
    with Collector() as collector:
        yield collector


def tracing(collector: Collector) -> dict[str, str]:
    """OpenTelemetry's variables: only what a caller samples is traced, and exported soon."""
    return {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.port}",
        "OTEL_TRACES_SAMPLER": "parentbased_always_off",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }


@pytest.fixture(scope="package")
def app(root, tmp_path_factory, collector):
    """`specprefill serve` of the shipped file on free ports; stopped by SIGTERM at the end."""
    set_auth_mode()
    file = tmp_path_factory.mktemp("e2e") / "local.yaml"
    http_port, grpc_port = free_port(), free_port()
    raw = with_ports(load(root / "cluster" / "local.yaml").raw, http_port, grpc_port)
    raw["applications"][0]["args"]["speculator"]["timeout_s"] = SPECULATOR_TIMEOUT_S
    raw["applications"][0]["runtime_env"]["env_vars"] |= tracing(collector)
    file.write_text(yaml.safe_dump(raw))
    server = subprocess.Popen(
        [
            BIN / "specprefill", "serve", file,
            "--timeout", str(START_TIMEOUT_S), "--drain", str(DRAIN_S),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={
            **os.environ,
            "PYTHONUNBUFFERED": "1",
            "RAY_metrics_report_interval_ms": str(int(1000 * EXPORT_S)),
        },
    )  # fmt: skip
    try:
        dashboard_url = _dashboard_url(server)
        app = App(file, http_port, grpc_port, dashboard_url, server.pid, ServeApi(dashboard_url))
        yield app
        _stop_in_mid_stream(app, server)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()
        server.stdout.close()


STREAM = {
    "model": "demo", "messages": [{"role": "user", "content": "Hello"}], "ignore_eos": True,
    "stream": True,
}  # fmt: skip


@contextlib.contextmanager
def streams_that_end(app: App, count: int = 4, max_tokens: int = 400):
    """Answers that are streamed while the `with` block runs, and end as they should after it."""
    begun = threading.Barrier(count + 1, timeout=60)

    def last_line(_):
        url, body = f"{app.http_url}/v1/chat/completions", {**STREAM, "max_tokens": max_tokens}
        with httpx.stream("POST", url, json=body, timeout=PATIENCE_S) as reply:
            lines = (line for line in reply.iter_lines() if line)
            assert next(lines).startswith("data: {")
            begun.wait()
            return list(lines)[-1]

    with ThreadPoolExecutor(count) as threads:
        ends = threads.map(last_line, range(count))
        begun.wait()
        yield
        assert list(ends) == ["data: [DONE]"] * count


def _stop_in_mid_stream(app: App, server: subprocess.Popen) -> None:
    """SIGTERM while answers are streamed: they end as they should, and nothing new begins."""
    url = f"{app.http_url}/v1/chat/completions"
    short = {**STREAM, "stream": False, "max_tokens": 1}
    with streams_that_end(app):
        server.send_signal(signal.SIGTERM)
        while (reply := httpx.post(url, json=short, timeout=60)).status_code == 200:
            continue  # the gateways have not heard of it yet
        assert reply.status_code == 503
        assert reply.headers["retry-after"] == "1"
        assert reply.json()["error"]["code"] == "unavailable"
    assert server.wait(STOP_TIMEOUT_S) == 0


def _dashboard_url(server: subprocess.Popen) -> str:
    """Read the command's own lines until it says that it is ready."""
    url, lines = "", []
    for line in server.stdout:
        lines.append(line)
        if "dashboard http" in line:
            url = line.rpartition("dashboard ")[2].strip().rstrip(")")
        if line.rstrip().endswith("ready"):
            # Somebody must go on reading, or the command blocks on a full pipe.
            threading.Thread(target=server.stdout.read, daemon=True).start()
            return url
    raise AssertionError("not ready:\n" + "".join(lines))


@pytest.fixture(scope="package")
def client(app):
    """The openai package's client, as any user would have it."""
    with openai.OpenAI(
        base_url=f"{app.http_url}/v1", api_key="none", max_retries=0, timeout=120
    ) as made:
        yield made


@pytest.fixture(scope="session")
def long_prompt(demo_tokenizer):
    """A chat of 1,500 tokens: long enough to be pruned."""
    from specprefill.synthetic.needles import needle_prompt

    return needle_prompt(11, 1500, demo_tokenizer)


def pruned(**more):
    return {"specprefill": {"keep": KEEP}, **more}


@pytest.fixture
def chat(client, long_prompt):
    def ask(**options):
        asked = {"messages": long_prompt.messages, "temperature": 0, "max_tokens": 12}
        options = {"extra_body": pruned(), **asked, **options}
        return client.chat.completions.create(model="demo", **options)

    return ask
