"""Mutual TLS between KV ports: the files, read and tried out before anything listens.

Files are read again when they change. New connections use the new ones; connections that exist
stay as they are.
"""

from __future__ import annotations

import logging
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ..config import KvTls
from ..core.errors import InvalidConfiguration

logger = logging.getLogger(__name__)

RELOAD_S = 1.0  # between two looks at the files


@dataclass(frozen=True, slots=True)
class MutualTls:
    """The identity and the trust of each side, in PEM. Every peer's certificate has `name`."""

    certificate: bytes
    key: bytes
    authority: bytes
    name: str

    def current(self) -> MutualTls:
        """See TlsSource."""
        return self


class TlsSource(Protocol):
    """Where connections take their identity and trust from."""

    def current(self) -> MutualTls:
        """Return what the next connection uses."""
        ...


class RenewedTls:
    """The files' content, read again when they change. Thread-safe.

    Files that peers would refuse, or that do not fit each other yet, change nothing.
    """

    def __init__(
        self, files: KvTls, first: MutualTls, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._files = files
        self._known = first
        self._now = now
        self._looked_s = now()
        self._complaint = ""
        self._lock = threading.Lock()

    def current(self) -> MutualTls:
        """See TlsSource."""
        with self._lock:
            if self._now() - self._looked_s >= RELOAD_S:
                self._looked_s = self._now()
                self._reload()
            return self._known

    def _reload(self) -> None:
        try:
            renewed = self._read_changed()
        except InvalidConfiguration as error:
            self._complain_once(str(error))
            return
        self._complaint = ""
        if renewed is not None:
            self._known = renewed
            logger.info("kv.tls: certificate, key or authority changed; new connections use them")

    def _read_changed(self) -> MutualTls | None:
        """Return the files' content if it differs from what is known. Raises as `read_tls` does."""
        known = self._known
        content = tuple(_read_file(field, path) for field, path in _paths(self._files))
        if content == (known.certificate, known.key, known.authority):
            return None
        return _read_valid(self._files)

    def _complain_once(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.warning("kv.tls: kept as it was: %s", complaint)
        self._complaint = complaint


def read_tls(files: KvTls | None) -> MutualTls | None:
    """Return the files' content; None stays None (plaintext).

    Raises InvalidConfiguration, naming the field, if a file cannot be read, is not what it
    should be, or if peers with the same files would refuse each other.
    """
    return None if files is None else _read_valid(files)


def watch_tls(files: KvTls | None) -> RenewedTls | None:
    """Return the files' content for as long as a process lives. Raises as `read_tls` does."""
    return None if files is None else RenewedTls(files, _read_valid(files))


def _read_valid(files: KvTls) -> MutualTls:
    certificate, key, authority = (_read_file(field, path) for field, path in _paths(files))
    _try_out(files)
    return MutualTls(certificate, key, authority, files.name)


def _paths(files: KvTls) -> tuple[tuple[str, str], ...]:
    return (
        ("certificate", files.certificate),
        ("key", files.key),
        ("authority", files.authority),
    )


def _read_file(field: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InvalidConfiguration(f"kv.tls.{field}: {path}: {error.strerror}") from error


def _try_out(files: KvTls) -> None:
    """Shake hands with ourselves: every peer would refuse what we refuse."""
    server_side, client_side = _contexts(files)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    server = server_side.wrap_bio(to_server, to_client, server_side=True)
    client = client_side.wrap_bio(to_client, to_server, server_hostname=files.name)
    try:
        # TLS 1.3: hello; answer and certificate; certificate and end; the server's end.
        for advance in (client.do_handshake, server.do_handshake) * 2:
            _as_far_as_it_goes(advance)
    except ssl.SSLCertVerificationError as error:
        raise InvalidConfiguration(
            f"kv.tls.certificate: peers would refuse it: {error.verify_message}"
        ) from error


def _as_far_as_it_goes(advance: Callable[[], None]) -> None:
    try:
        advance()
    except ssl.SSLWantReadError:
        return  # it is the other side's turn


def _contexts(files: KvTls) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.verify_mode = ssl.CERT_REQUIRED
    for context in (server, client):
        try:
            context.load_cert_chain(files.certificate, files.key, password=_no_password)
        except (ssl.SSLError, ValueError) as error:
            raise InvalidConfiguration(
                f"kv.tls.certificate, kv.tls.key: not a PEM certificate and its key without "
                f"a password: {error}"
            ) from error
        try:
            context.load_verify_locations(files.authority)
        except ssl.SSLError as error:
            raise InvalidConfiguration(
                f"kv.tls.authority: not a PEM certificate: {error}"
            ) from error
    return server, client


def _no_password() -> str:
    """Raise for an encrypted key, so that no terminal prompt asks for its password."""
    return ""
