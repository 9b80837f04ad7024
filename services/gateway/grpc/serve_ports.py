"""The gRPC port of a gateway: bound to the host of HTTP, and shared with no other process.

Serve binds a replica's gRPC port to every interface, and asks for an exclusive port in a way that
gRPC does not understand (`grpc.so_reuseport` as text): two services on one machine would answer
each other's calls.
"""

from __future__ import annotations

import socket
from typing import Any

from ..serve_internals import bind_grpc_with, http_host


def bind_grpc_as_http() -> None:
    """Bind the gRPC ports that this process opens to the host of `http_options`."""
    host = http_host()

    def add_grpc_address(grpc_server: Any, server_address: str) -> None:
        """Raises RuntimeError where the port is taken, upon which Serve tries the next one."""
        port = int(server_address.rpartition(":")[2])
        claim(host, port)
        grpc_server.add_insecure_port(f"{host}:{port}")

    bind_grpc_with(add_grpc_address)


def setup() -> list[Any]:
    """Set up Serve's proxies (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`). Adds no middleware."""
    bind_grpc_as_http()
    return []


def claim(host: str, port: int) -> None:
    """Claim the port, so that nobody else listens there, now or later. Raises RuntimeError.

    gRPC itself would share the port. Other services of ours are kept out by a name that only one
    process can hold, other programs by a trial bind of the port.
    """
    name = socket.socket(socket.AF_UNIX)
    try:
        name.bind(f"\0specprefill/grpc/{port}")
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((host, port))
    except OSError as error:
        name.close()
        raise RuntimeError(f"gRPC port {port} of {host} is taken") from error
    name.detach()  # the name is held until the process ends
