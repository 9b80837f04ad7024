"""Addresses as text. Pure."""

from __future__ import annotations


def host_and_port(host: str, port: int) -> str:
    """Return the address of a port as URLs and gRPC have it: an IPv6 host in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
