"""Certificates for tests, made on the spot: an authority, and what it signs."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
)
from cryptography.x509.oid import NameOID

from specprefill.config import KvTls

DAY = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Authority:
    """Signs certificates into its folder."""

    folder: Path
    key: ec.EllipticCurvePrivateKey = field(
        default_factory=lambda: ec.generate_private_key(ec.SECP256R1())
    )

    def files(
        self, *, name: str = "specprefill", days: int = 1, password: bytes | None = None
    ) -> KvTls:
        """A certificate for `name` that ends in `days`, its key, and this authority's own."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate = self._certificate(key, "worker", days).add_extension(
            x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False
        )
        own = self._certificate(self.key, "authority", 2).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        self.folder.mkdir(exist_ok=True)
        lock = NoEncryption() if password is None else BestAvailableEncryption(password)
        paths = {part: self.folder / f"{part}.pem" for part in ("certificate", "key", "authority")}
        paths["certificate"].write_bytes(self._signed(certificate))
        paths["key"].write_bytes(_key_pem(key, lock))
        paths["authority"].write_bytes(self._signed(own))
        return KvTls(**{part: str(path) for part, path in paths.items()})

    def _certificate(
        self, key: ec.EllipticCurvePrivateKey, subject: str, days: int
    ) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            _named("authority"),
            _named(subject),
            key.public_key(),
            x509.random_serial_number(),
            now - 2 * DAY,
            now + days * DAY,
        )

    def _signed(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self.key, hashes.SHA256()).public_bytes(Encoding.PEM)


def _named(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _key_pem(key: ec.EllipticCurvePrivateKey, lock: KeySerializationEncryption) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, lock)
