"""HAProxy as Serve runs it, before servers of a test: Serve's own configuration, our changes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn
import yaml
from ray.serve._private.common import RequestProtocol
from ray.serve._private.haproxy import BackendConfig, HAProxyApi, HAProxyConfig, ServerConfig
from ray.serve.config import HTTPOptions, gRPCOptions

from specprefill.deployment.front import FILE_VARIABLE
from specprefill.deployment.local_ray import REPLICA_PORTS

HOST = "127.0.0.1"
PORTS = range(REPLICA_PORTS[1], 32_700)  # below those that the system gives to anybody
PORTS_OF_A_WORKER = 300  # of pytest's workers
SERVICER = "specprefill.gateway.grpc.serving.add_SpecPrefillServicer_to_server"
START_TIMEOUT_S = 60.0  # on a machine whose cores other tests have


@dataclass(frozen=True)
class Front:
    """A running HAProxy."""

    http_port: int
    grpc_port: int
    metrics_port: int
    stats_port: int
    config: Path
    socket: Path
    pid: int

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.http_port}"


def free_ports(count: int) -> list[int]:
    """Different ports that nobody uses now, and that no other worker of this run takes."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    shares = len(PORTS) // PORTS_OF_A_WORKER
    mine = PORTS[worker % shares * PORTS_OF_A_WORKER :][:PORTS_OF_A_WORKER]
    ports: list[int] = []
    with contextlib.ExitStack() as held:  # each until all are found
        for port in random.sample(mine, len(mine)):
            with contextlib.suppress(OSError):
                held.enter_context(socket.socket()).bind((HOST, port))
                ports.append(port)
            if len(ports) == count:
                return ports
    raise AssertionError("no port is free")


def serve_config(
    folder: Path,
    http_servers: list[int],
    grpc_servers: list[int] = (),
    *,
    fallback: int | None = None,
) -> Front:
    """Write what Serve would write; nothing runs yet. `fallback` is the port of Serve's proxy."""
    taken = {*http_servers, *grpc_servers}  # some of them closed
    ports = [port for port in free_ports(4 + len(taken)) if port not in taken][:4]
    config = HAProxyConfig(
        http_options=HTTPOptions(host=HOST, port=ports[0]),
        grpc_options=gRPCOptions(port=ports[1], grpc_servicer_functions=[SERVICER]),
        metrics_port=ports[2],
        stats_port=ports[3],
        socket_path=str(folder / "admin.sock"),
        server_state_base=str(folder),
        server_state_file=str(folder / "server-state"),
        metrics_socket_path=str(folder / "metrics.sock"),
        is_head=True,
        has_received_routes=True,
        has_received_servers=True,
        nbthread=1,
    )
    protocols = {RequestProtocol.HTTP: http_servers, RequestProtocol.GRPC: grpc_servers}
    backends = [
        BackendConfig(
            name=f"{protocol.value.lower()}-app",
            path_prefix="/",
            app_name="app",
            protocol=protocol,
            servers=[ServerConfig(f"s{port}", HOST, port) for port in servers],
            fallback_server=fallback and ServerConfig("fallback", HOST, fallback),
        )
        for protocol, servers in protocols.items()
    ]
    path = folder / "haproxy.cfg"
    api = HAProxyApi(config, {each.name: each for each in backends}, str(path))
    api._generate_config_file_internal()
    return Front(*ports, path, folder / "admin.sock", 0)


@contextlib.contextmanager
def running(front: Front, gateway: dict) -> Iterator[Front]:
    """The front with `gateway` of a deployment file, until the `with` block ends."""
    deployment = front.config.parent / "deployment.yaml"
    args = {"model": {"path": "m"}, "speculator": {"path": "s"}, "gateway": gateway}
    application = {"name": "app", "import_path": "specprefill.app:build", "args": args}
    deployment.write_text(yaml.safe_dump({"applications": [application]}))
    command = [sys.executable, "-c", "from specprefill.deployment.front import main; main()"]
    with subprocess.Popen(
        [*command, "-db", "-f", str(front.config)],
        # As Serve's: whoever asks where HAProxy is would find the front itself.
        env={
            **os.environ,
            FILE_VARIABLE: str(deployment),
            "RAY_SERVE_HAPROXY_BINARY_PATH": sys.executable,
        },
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            wait_listening(process, front.http_port)
            yield Front(**{**vars(front), "pid": process.pid})
        finally:
            process.kill()


def wait_listening(process: subprocess.Popen, port: int) -> None:
    """Until the front accepts connections. Raises AssertionError with its own words."""
    give_up_s = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < give_up_s:
        if process.poll() is not None:
            raise AssertionError(process.stderr.read())
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.02)
    raise AssertionError("the front does not listen")


@contextlib.asynccontextmanager
async def serving(app) -> AsyncIterator[int]:
    """An ASGI app on a free port."""
    server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="critical"))
    with contextlib.closing(socket.socket()) as listener:
        listener.bind((HOST, 0))
        listener.listen()  # connections wait from here on
        task = asyncio.create_task(server.serve(sockets=[listener]))
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


@dataclass
class Gateway:
    """An ASGI app that answers, waits or streams as the path asks, and notes who left."""

    left: asyncio.Queue = field(default_factory=asyncio.Queue)
    came: asyncio.Queue = field(default_factory=asyncio.Queue)

    async def __call__(self, scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        if scope["path"] == "/-/healthz":
            await self._start(send)
            await send({"type": "http.response.body", "body": b"healthy"})
            return
        self.came.put_nowait(dict(scope["headers"]))
        if scope["path"] == "/answer":
            await self._start(send)
            await send({"type": "http.response.body", "body": b"ok"})
            return
        if scope["path"] == "/stream":
            await self._start(send)
            await send({"type": "http.response.body", "body": b"data", "more_body": True})
        assert (await receive())["type"] == "http.disconnect"
        self.left.put_nowait(scope["path"])

    async def _start(self, send):
        headers = [(b"content-type", b"text/plain")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})


@contextlib.asynccontextmanager
async def fronted(folder, gateway, config):
    async with serving(gateway) as port:
        with running(serve_config(folder, [port]), config) as front:
            yield front
