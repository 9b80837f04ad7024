"""Two gRPC servers on one machine never share a port, whatever gRPC would allow."""

import socket
import subprocess
import sys

import grpc
import pytest

from specprefill.gateway.grpc.serve_ports import claim

HOST = "127.0.0.1"
ELSEWHERE = """
import sys
from specprefill.gateway.grpc.serve_ports import claim
try:
    claim("127.0.0.1", int(sys.argv[1]))
except RuntimeError as error:
    sys.exit(f"refused: {error}")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return probe.getsockname()[1]


async def test_a_port_that_grpc_would_share_is_refused():
    server = grpc.aio.server()  # shares its port by default, as Serve's does
    port = server.add_insecure_port(f"{HOST}:0")
    await server.start()
    with pytest.raises(RuntimeError, match=str(port)):
        claim(HOST, port)
    await server.stop(0)


def test_a_port_claimed_by_one_process_is_refused_to_another():
    port = free_port()
    claim(HOST, port)  # nobody listens yet
    other = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, str(port)], capture_output=True, text=True, check=False
    )
    assert other.returncode != 0
    assert "refused" in other.stderr
