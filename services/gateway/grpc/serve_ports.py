"""Binds a gateway's gRPC port to the host of HTTP, exclusively, and limits its messages.

Serve binds a replica's gRPC port to every interface, and asks for an exclusive port in a way that
gRPC does not understand (`grpc.so_reuseport` as text): two services on one machine would answer
each other's calls. `default_impl.add_grpc_address` is Serve's own extension point. No other module
uses private names of Serve for this.
"""

from __future__ import annotations

import socket
from typing import Any

from ray.serve._private import default_impl
from ray.serve._private.constants import DEFAULT_GRPC_SERVER_OPTIONS
from ray.serve.context import _get_global_client

_CLAIMS: list[socket.socket] = []  # held until the process ends


def bind_grpc_as_http() -> None:
    """Bind this process's gRPC ports to the host of `http_options` from now on."""
    host = str(_get_global_client().http_config.host)

    def add_grpc_address(server: Any, address: str) -> None:
        """Add the port. Raises RuntimeError where it is taken: Serve then tries the next one."""
        port = int(address.rpartition(":")[2])
        claim(host, port)
        server.add_insecure_port(f"{host}:{port}")

    default_impl.add_grpc_address = add_grpc_address


def limit_grpc_messages(max_bytes: int) -> None:
    """Make this process's gRPC servers refuse larger messages unread; Serve accepts 2 GiB."""
    name = "grpc.max_receive_message_length"
    others = [option for option in DEFAULT_GRPC_SERVER_OPTIONS if option[0] != name]
    DEFAULT_GRPC_SERVER_OPTIONS[:] = [*others, (name, max_bytes)]


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
    _CLAIMS.append(name)
