"""The gRPC port of a gateway: bound to the host of HTTP, and shared with no other process.

Serve binds a replica's gRPC port to every interface, and asks for an exclusive port in a way that
gRPC does not understand (`grpc.so_reuseport` as text): two services on one machine would answer
each other's calls. Serve's own proxies bind theirs in the same way, and take messages of 2 GiB.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path
from typing import Any

from ...config import GatewayConfig
from ...core.addresses import host_and_port
from ...deployment.checked_yaml import InvalidFile
from ...deployment.file import load
from ...deployment.front import FILE_VARIABLE
from ..serve_internals import (
    are_received_bytes_limited,
    bind_grpc_with,
    http_host,
    limit_received_bytes,
)

logger = logging.getLogger(__name__)


def bind_grpc_as_http() -> None:
    """Bind the gRPC ports that this process opens to the host of `http_options`."""
    host = http_host()

    def add_grpc_address(grpc_server: Any, server_address: str) -> None:
        """Raises RuntimeError where the port is taken, upon which Serve tries the next one."""
        port = int(server_address.rpartition(":")[2])
        claim(host, port)
        grpc_server.add_insecure_port(host_and_port(host, port))

    bind_grpc_with(add_grpc_address)


def setup() -> list[Any]:
    """Set up Serve's proxies (`RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`). Adds no middleware.

    Gateways call it, too, after their constructor, which has set the limit of their own file.
    """
    bind_grpc_as_http()
    if not are_received_bytes_limited():
        limit_received_bytes(most_received_bytes(os.environ.get(FILE_VARIABLE)))
    return []


def most_received_bytes(name: str | None) -> int:
    """Return the largest message that a gateway of the deployment file `name` accepts.

    The default where there is no file, or none that can be used.
    """
    if name:
        try:
            applications = load(Path(name)).file.applications
        except InvalidFile as error:
            logger.warning("%s; gRPC messages are limited as by default", error)
        else:
            return max(each.args.gateway.max_body_bytes for each in applications)
    return GatewayConfig().max_body_bytes


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
