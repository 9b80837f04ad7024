"""A service that runs while inside, started by the product's own command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from specprefill.deployment.file import with_ports
from specprefill.deployment.local_ray import free_port

from .watch import Watch

HOST = "127.0.0.1"
START_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 90.0
_DASHBOARD = "(dashboard "


@dataclass(frozen=True, slots=True)
class Served:
    """Where it is reached, and what runs below it."""

    http_port: int
    grpc_port: int
    dashboard_url: str
    watch: Watch


@contextmanager
def serving(raw: Mapping[str, Any]) -> Iterator[Served]:
    """`specprefill serve` of a deployment file's content, on free ports."""
    http_port, grpc_port = free_port(), free_port()
    with tempfile.TemporaryDirectory() as folder:
        file, log = Path(folder) / "served.yaml", Path(folder) / "serve.log"
        file.write_text(yaml.safe_dump(with_ports(raw, http_port, grpc_port)), encoding="utf-8")
        with log.open("w") as output:
            server = subprocess.Popen(
                [sys.executable, "-m", "specprefill.cli", "serve", str(file)],
                stdout=output, stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
        try:
            url = _await_ready(server, log)
            yield Served(http_port, grpc_port, url, Watch(server.pid))
        finally:
            server.send_signal(signal.SIGTERM)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _await_ready(server: subprocess.Popen[bytes], log: Path) -> str:
    """Return the dashboard's address once every pool is healthy."""
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while "] ready" not in (text := log.read_text()):
        if server.poll() is not None or time.monotonic() > give_up_s:
            raise RuntimeError("the service did not start:\n" + text)
        time.sleep(0.5)
    return text.partition(_DASHBOARD)[2].partition(")")[0]
