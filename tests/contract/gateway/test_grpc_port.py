"""Two gRPC servers on one machine never share a port, whatever gRPC would allow."""

import asyncio
import socket
import subprocess
import sys

import grpc
import pytest
import yaml
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS
from ray.serve._private.default_impl import add_grpc_address
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve.config import gRPCOptions

from specprefill.config import GatewayConfig
from specprefill.gateway import serve_internals
from specprefill.gateway.grpc import serve_ports
from specprefill.gateway.grpc.serve_ports import claim, most_received_bytes
from specprefill.rpc import specprefill_pb2 as pb
from specprefill.rpc.specprefill_pb2_grpc import (
    SpecPrefillServicer,
    SpecPrefillStub,
    add_SpecPrefillServicer_to_server,
)
from tests.contract.fronts import HOST, free_ports

ELSEWHERE = """
import sys
from specprefill.gateway.grpc.serve_ports import claim
try:
    claim("127.0.0.1", int(sys.argv[1]))
except RuntimeError as error:
    sys.exit(f"refused: {error}")
"""


MESSAGE_BYTES = 20_000


@pytest.fixture
def deployment(root, tmp_path):
    """A deployment file whose gateways take messages of half of MESSAGE_BYTES."""
    raw = yaml.safe_load((root / "cluster" / "local.yaml").read_text())
    raw["applications"][0]["args"].setdefault("gateway", {})["max_body_bytes"] = MESSAGE_BYTES // 2
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump(raw))
    return str(file)


@pytest.fixture
def serve(monkeypatch):
    """Serve in this process, as it was before and is again afterwards."""
    monkeypatch.setattr(serve_ports, "http_host", lambda: HOST)
    monkeypatch.setattr(serve_internals.default_impl, "add_grpc_address", add_grpc_address)
    before = list(DEFAULT_GRPC_SERVER_OPTIONS)
    yield
    DEFAULT_GRPC_SERVER_OPTIONS[:] = before


async def test_a_port_that_grpc_would_share_is_refused():
    server = grpc.aio.server()  # shares its port by default, as Serve's does
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    with pytest.raises(RuntimeError, match=str(port)):
        claim(HOST, port)
    await server.stop(0)


def test_a_port_claimed_by_one_process_is_refused_to_another():
    (port,) = free_ports(1)
    claim(HOST, port)  # nobody listens yet
    other = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(port)], capture_output=True, text=True, check=False
    )
    assert other.returncode != 0
    assert "refused" in other.stderr


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


class Healthy(SpecPrefillServicer):
    """Answers Health."""

    async def Health(self, request, context):
        return pb.HealthResponse(serving=True)


@pytest.mark.skipif(not has_ipv6(), reason="this machine has no IPv6")
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_a_gateway_on_an_ipv6_host_answers_there(serve, monkeypatch, host):
    monkeypatch.setattr(serve_ports, "http_host", lambda: host)
    serve_ports.bind_grpc_as_http()
    (port,) = free_ports(1)
    server = grpc.aio.server()
    add_SpecPrefillServicer_to_server(Healthy(), server)
    serve_internals.default_impl.add_grpc_address(server, f"0.0.0.0:{port}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"[::1]:{port}") as channel:
            answer = await SpecPrefillStub(channel).Health(pb.HealthRequest(), timeout=10)
        assert answer.serving
    finally:
        await server.stop(0)


async def status_of_a_large_message():
    """The status that a server of Serve's proxy answers a large message with."""

    def factory(service_method, streaming_type):
        async def answer(_message, _context):
            return b""

        return answer

    servicer = "specprefill.gateway.grpc.serving.add_SpecPrefillServicer_to_server"
    (port,) = free_ports(1)
    options = gRPCOptions(port=port, grpc_servicer_functions=[servicer])
    running, server = await start_grpc_server(
        factory, options, event_loop=asyncio.get_running_loop()
    )
    message = pb.GenerateRequest(text="x" * MESSAGE_BYTES)
    async with grpc.aio.insecure_channel(f"{HOST}:{options.port}") as channel:
        try:
            await SpecPrefillStub(channel).Generate(message, timeout=10)
        except grpc.aio.AioRpcError as error:
            return error.code()
        finally:
            await server.stop(0)
            await running
    return grpc.StatusCode.OK


async def test_serves_own_proxy_refuses_a_message_that_no_gateway_would_take(
    serve, deployment, monkeypatch
):
    monkeypatch.setenv("SPECPREFILL_DEPLOYMENT_FILE", deployment)
    assert serve_ports.setup() == []
    assert await status_of_a_large_message() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_a_gateway_keeps_the_limit_of_its_own_deployment(serve, deployment, monkeypatch):
    monkeypatch.setenv("SPECPREFILL_DEPLOYMENT_FILE", deployment)  # not yet the one it runs with
    serve_internals.limit_received_bytes(2 * MESSAGE_BYTES)
    serve_ports.setup()
    assert await status_of_a_large_message() is grpc.StatusCode.OK


def test_a_proxy_that_knows_no_file_has_the_default_limit(deployment, tmp_path):
    assert most_received_bytes(deployment) == MESSAGE_BYTES // 2
    for name in (None, "", str(tmp_path / "none.yaml")):
        assert most_received_bytes(name) == GatewayConfig().max_body_bytes
