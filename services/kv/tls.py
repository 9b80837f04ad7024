"""Mutual TLS between KV ports: the files, read and tried out before anything listens."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..config import KvTls
from ..core.errors import InvalidConfiguration


@dataclass(frozen=True, slots=True)
class MutualTls:
    """The identity and the trust of each side, in PEM. Every peer's certificate has `name`."""

    certificate: bytes
    key: bytes
    authority: bytes
    name: str


def read_tls(files: KvTls | None) -> MutualTls | None:
    """Return the files' content; None stays None (plaintext).

    Raises InvalidConfiguration, naming the field, if a file cannot be read, is not what it
    should be, or if peers with the same files would refuse each other.
    """
    if files is None:
        return None
    tls = MutualTls(
        certificate=_read_file("certificate", files.certificate),
        key=_read_file("key", files.key),
        authority=_read_file("authority", files.authority),
        name=files.name,
    )
    _try_out(files)
    return tls


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
