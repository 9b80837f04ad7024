"""A gateway over scripted pools behind the real HAProxy: the fuzzer's target without engines.

python -m tests.fuzz.scripted GRPC_PORT FOLDER
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from specprefill.deployment.local_ray import free_port

from .served import START_TIMEOUT_S, STOP_TIMEOUT_S, Served
from .watch import Watch

KEY = "test-key"  # of the contract tests' gateway
_UP = re.compile(r"^up (\d+)$", re.MULTILINE)


@contextmanager
def scripted() -> Iterator[Served]:
    """The gateway in a process of its own, on free ports; its log is watched."""
    grpc_port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "logs" / "gateway.log"
        log.parent.mkdir()
        command = [sys.executable, "-m", __name__, str(grpc_port), folder]
        with log.open("w") as output:
            server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        try:
            give_up_s = time.monotonic() + START_TIMEOUT_S
            while not (up := _UP.search(log.read_text())):
                if server.poll() is not None or time.monotonic() > give_up_s:
                    raise RuntimeError("the gateway did not start:\n" + log.read_text())
                time.sleep(0.5)
            yield Served(int(up.group(1)), grpc_port, "", Watch(server.pid, log.parent))
        finally:
            server.send_signal(signal.SIGINT)
            try:
                server.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


async def serve(grpc_port: int, folder: Path) -> None:
    """Serve until cancelled."""
    from specprefill.gateway.grpc.api import GrpcApi
    from specprefill.gateway.grpc.serving import add_SpecPrefillServicer_to_server
    from specprefill.gateway.openai.server import build_client, build_explainer, build_http_app
    from tests.contract import conftest as contract
    from tests.contract.fronts import running, serve_config, serving
    from tests.contract.gateway.test_gateway_grpc import JSON_LIMITS, MAX_MESSAGE_BYTES, Servicer

    class Forgetful(contract.ScriptedPipeline):
        """Keeps no request."""

        async def generate(self, request: Any) -> AsyncIterator[Any]:
            async for chunk in super().generate(request):
                yield chunk
            self.requests.clear()

    health, config = contract.ScriptedHealth(), contract.configuration()
    client = build_client(config, Forgetful(), contract.PLANNER)
    app = await build_http_app(
        config, client, health, contract.KEYS, contract.LIMIT, contract.metrics_text
    )

    async def with_healthz(scope: Any, receive: Any, send: Any) -> None:
        """Answer HAProxy's health check, as Serve does around a gateway."""
        if scope["type"] != "http" or scope["path"] != "/-/healthz":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    api = GrpcApi(
        client, build_explainer(config, client), ("demo",), contract.KEYS, contract.LIMIT,
        health,
        max_message_bytes=MAX_MESSAGE_BYTES, json_limits=JSON_LIMITS,
    )  # fmt: skip
    server = grpc.aio.server()
    add_SpecPrefillServicer_to_server(Servicer(api), server)
    server.add_insecure_port(f"127.0.0.1:{grpc_port}")
    await server.start()
    async with serving(with_healthz) as port:
        with running(serve_config(folder, [port]), {}) as front:
            sys.stdout.write(f"\nup {front.http_port}\n")
            sys.stdout.flush()
            await asyncio.Event().wait()


if __name__ == "__main__":
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    warnings.simplefilter("ignore")
    try:
        asyncio.run(serve(int(sys.argv[1]), Path(sys.argv[2])))
    except KeyboardInterrupt:
        sys.stdout.write("stopped\n")
