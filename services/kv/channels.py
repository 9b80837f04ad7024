"""The gRPC channels between KV ports: plain, or under mutual TLS."""

from __future__ import annotations

import threading

import grpc

from .tls import MutualTls

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # a stale peer on the same port must be an error
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection: streams run in parallel
]


class Channels:
    """Channels to peers, opened when first asked for and kept. Thread-safe."""

    def __init__(self, tls: MutualTls | None) -> None:
        self._tls = tls
        self._opened: dict[tuple[str, int], grpc.Channel] = {}
        self._lock = threading.Lock()

    def channel_to(self, peer: str, part: int = 0) -> grpc.Channel:
        """Return the channel to `peer`, `host:port`; each `part` is a connection of its own."""
        with self._lock:
            if (peer, part) not in self._opened:
                self._opened[peer, part] = open_channel(peer, self._tls)
            return self._opened[peer, part]

    def close(self) -> None:
        """Close every channel; calls under way fail."""
        with self._lock:
            for opened in self._opened.values():
                opened.close()
            self._opened.clear()


def listen(server: grpc.Server, host: str, tls: MutualTls | None, port: int = 0) -> str:
    """Bind `port` of `host`, 0 for a free one; with `tls`, callers must show a certificate.

    Returns `host:port`.
    """
    wanted = f"{host}:{port}"
    if tls is None:
        return f"{host}:{server.add_insecure_port(wanted)}"
    pair = (tls.key, tls.certificate)
    credentials = grpc.ssl_server_credentials([pair], tls.authority, require_client_auth=True)
    return f"{host}:{server.add_secure_port(wanted, credentials)}"


def open_channel(peer: str, tls: MutualTls | None) -> grpc.Channel:
    """Return a channel to `peer`, `host:port`; it connects when first used."""
    if tls is None:
        return grpc.insecure_channel(peer, options=OPTIONS)
    return grpc.secure_channel(peer, _credentials(tls), options=_name_options(tls))


def open_aio_channel(peer: str, tls: MutualTls | None) -> grpc.aio.Channel:
    """Return such a channel for an asyncio program."""
    if tls is None:
        return grpc.aio.insecure_channel(peer, options=OPTIONS)
    return grpc.aio.secure_channel(peer, _credentials(tls), options=_name_options(tls))


def _credentials(tls: MutualTls) -> grpc.ChannelCredentials:
    return grpc.ssl_channel_credentials(tls.authority, tls.key, tls.certificate)


def _name_options(tls: MutualTls) -> list[tuple[str, int | str]]:
    """Return options that expect the one name in the peers' certificates: addresses change."""
    return [*OPTIONS, ("grpc.ssl_target_name_override", tls.name)]
