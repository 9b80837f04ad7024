"""The gRPC channels between KV ports: plain, or under mutual TLS."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import grpc

from ..core.errors import KvTransferError
from .recent import MOST, Recent
from .refusals import PersistentCall
from .tls import MutualTls, TlsSource

OPTIONS: list[tuple[str, int | str]] = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.so_reuseport", 0),  # a stale peer on the same port must be an error
    ("grpc.use_local_subchannel_pool", 1),  # a channel is a connection: streams run in parallel
]


class Channels:
    """Channels to peers, opened when first asked for. Thread-safe.

    They are kept as `Recent` does: one that calls use is not closed. After a change of
    certificates a peer's next call opens a new channel; the one before is closed at the change
    after that, when its calls have ended long since.
    """

    def __init__(self, tls: TlsSource | None, most: int = MOST) -> None:
        self._tls = tls
        self._opened: Recent[tuple[str, int], grpc.Channel] = Recent(most)
        self._retired: list[grpc.Channel] = []
        self._used: MutualTls | None = None
        self._closed = False
        self._lock = threading.Lock()

    def stream(
        self, peer: str, method: str, message: bytes, part: int = 0, *, retry_s: float = 0.0
    ) -> PersistentCall:
        """Start a call that `peer`, `host:port`, answers with a stream.

        Each `part` is a connection of its own. While the peer has too many calls, it is asked
        again, for `retry_s`. Raises KvTransferError after `close`.
        """
        return PersistentCall(lambda: self._start(peer, method, message, part), retry_s)

    def close(self) -> None:
        """Close every channel; calls under way fail."""
        with self._lock:
            self._closed = True
            for opened in (*self._opened.take_all(), *self._retired):
                opened.close()
            self._retired.clear()

    def _start(self, peer: str, method: str, message: bytes, part: int) -> Any:
        with self._lock:
            if self._closed:
                raise KvTransferError(f"kv: the connections are closed, also to {peer}")
            self._retire_if_changed()
            channel = self._opened.get((peer, part))
            if channel is None:
                channel = open_channel(peer, self._used)
            start: Any = channel.unary_stream(method)
            call = start(message)
            self._opened.use((peer, part), channel, call)
            for unused in self._opened.take_unused():
                unused.close()
            return call

    def _retire_if_changed(self) -> None:
        now = None if self._tls is None else self._tls.current()
        if now is self._used:
            return
        for retired in self._retired:
            retired.close()
        self._retired = self._opened.take_all()
        self._used = now


class AioChannels:
    """Channels of an asyncio program, one per peer; otherwise as `Channels`.

    A call that outlasts two changes of certificates, as a watch does, ends with its channel:
    grpc.aio then raises CancelledError, although nobody has cancelled its task.
    """

    def __init__(self, tls: TlsSource | None, most: int = MOST) -> None:
        self._tls = tls
        self._opened: Recent[str, grpc.aio.Channel] = Recent(most)
        self._retired: list[grpc.aio.Channel] = []
        self._used: MutualTls | None = None

    async def stream(self, peer: str, method: str, message: bytes) -> Any:
        """Start a call that `peer`, `host:port`, answers with a stream."""
        return await self._start(peer, lambda channel: channel.unary_stream(method), message)

    async def ask(self, peer: str, method: str, message: bytes, timeout_s: float) -> Any:
        """Start a call with one answer, to be awaited."""
        return await self._start(
            peer, lambda channel: channel.unary_unary(method), message, timeout_s
        )

    async def close(self) -> None:
        """Close every channel."""
        channels = [*self._opened.take_all(), *self._retired]
        self._retired = []
        await _close_all(channels)

    async def _start(
        self,
        peer: str,
        bind: Callable[[grpc.aio.Channel], Any],
        message: bytes,
        timeout_s: float | None = None,
    ) -> Any:
        outdated = self._retire_if_changed()
        channel = self._opened.get(peer)
        if channel is None:
            channel = open_aio_channel(peer, self._used)
        call = bind(channel)(message, timeout=timeout_s)
        self._opened.use(peer, channel, call)
        await _close_all([*outdated, *self._opened.take_unused()])
        return call

    def _retire_if_changed(self) -> list[grpc.aio.Channel]:
        """Return the channels to close now."""
        now = None if self._tls is None else self._tls.current()
        if now is self._used:
            return []
        outdated, self._retired = self._retired, self._opened.take_all()
        self._used = now
        return outdated


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
