"""The gRPC channels between KV ports: plain, or under mutual TLS."""

from __future__ import annotations

import threading

import grpc

from .tls import MutualTls, TlsSource

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # a stale peer on the same port must be an error
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection: streams run in parallel
]


class Channels:
    """Channels to peers, opened when first asked for and kept. Thread-safe.

    After a change of certificates a peer's next call opens a new channel; the one before is
    closed at the change after that, when its calls have ended long since.
    """

    def __init__(self, tls: TlsSource | None) -> None:
        self._tls = tls
        self._opened: dict[tuple[str, int], grpc.Channel] = {}
        self._retired: list[grpc.Channel] = []
        self._used: MutualTls | None = None
        self._lock = threading.Lock()

    def channel_to(self, peer: str, part: int = 0) -> grpc.Channel:
        """Return the channel to `peer`, `host:port`; each `part` is a connection of its own."""
        with self._lock:
            self._retire_if_changed()
            if (peer, part) not in self._opened:
                self._opened[peer, part] = open_channel(peer, self._used)
            return self._opened[peer, part]

    def close(self) -> None:
        """Close every channel; calls under way fail."""
        with self._lock:
            for opened in (*self._opened.values(), *self._retired):
                opened.close()
            self._opened.clear()
            self._retired.clear()

    def _retire_if_changed(self) -> None:
        now = None if self._tls is None else self._tls.current()
        if now is self._used:
            return
        for retired in self._retired:
            retired.close()
        self._retired = list(self._opened.values())
        self._opened.clear()
        self._used = now


class AioChannels:
    """Channels of an asyncio program, one per peer; otherwise as `Channels`."""

    def __init__(self, tls: TlsSource | None) -> None:
        self._tls = tls
        self._opened: dict[str, grpc.aio.Channel] = {}
        self._retired: list[grpc.aio.Channel] = []
        self._used: MutualTls | None = None

    async def channel_to(self, peer: str) -> grpc.aio.Channel:
        """Return the channel to `peer`, `host:port`."""
        now = None if self._tls is None else self._tls.current()
        if now is not self._used:
            outdated, self._retired = self._retired, list(self._opened.values())
            self._opened, self._used = {}, now
            await _close_all(outdated)
        if peer not in self._opened:
            self._opened[peer] = open_aio_channel(peer, self._used)
        return self._opened[peer]

    async def close(self) -> None:
        """Close every channel."""
        channels = [*self._opened.values(), *self._retired]
        self._opened, self._retired = {}, []
        await _close_all(channels)


async def _close_all(channels: list[grpc.aio.Channel]) -> None:
    for opened in channels:
        await opened.close()


def listen(server: grpc.Server, host: str, tls: TlsSource | None, port: int = 0) -> str:
    """Bind `port` of `host`, 0 for a free one; with `tls`, callers must show a certificate.

    Returns `host:port`.
    """
    wanted = f"{host}:{port}"
    if tls is None:
        return f"{host}:{server.add_insecure_port(wanted)}"
    return f"{host}:{server.add_secure_port(wanted, _server_credentials(tls))}"


def _server_credentials(tls: TlsSource) -> grpc.ServerCredentials:
    """Return credentials that each handshake takes from `tls` anew."""

    def newest() -> grpc.ServerCertificateConfiguration:
        now = tls.current()
        pair = (now.key, now.certificate)
        return grpc.ssl_server_certificate_configuration([pair], now.authority)

    return grpc.dynamic_ssl_server_credentials(newest(), newest, require_client_authentication=True)


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
