"""The certificates that the front serves with: copies of the operator's files, beside its own."""

from __future__ import annotations

import sys
from collections.abc import Collection
from pathlib import Path

from ..config import FrontTls
from ..core.errors import InvalidConfiguration
from .certificates import CertificateFiles, WatchOrder, admin_socket, write_privately


def tls_parameters(tls: FrontTls | None, folder: Path) -> str:
    """Return what a `bind` line of HAProxy's needs, with the copies in `folder`."""
    if tls is None:
        return ""
    shown = f' ssl crt "{_pem_file(folder)}"'
    if tls.client_authority is None:
        return shown
    return f'{shown} ca-file "{_authority_file(folder)}" verify required'


def _pem_file(folder: Path) -> Path:
    return folder / "front.pem"


def _authority_file(folder: Path) -> Path:
    return folder / "front-authority.pem"


def check_tls(tls: FrontTls | None) -> None:
    """Raise InvalidConfiguration, naming the field, unless the files can be used."""
    if tls is not None:
        _certificate_files(tls).check()


def _certificate_files(tls: FrontTls) -> CertificateFiles:
    return CertificateFiles(tls.certificate, tls.key, tls.client_authority)


def watch_of(tls: FrontTls, config: Path) -> WatchOrder:
    """Return the order to watch the files, for the HAProxy of the file `config`."""
    folder = config.parent
    copies = (str(_pem_file(folder)), str(_authority_file(folder)))
    return WatchOrder(_certificate_files(tls), *copies, admin_socket(config.read_text()))


def copy_certificates(folder: Path, tls: FrontTls | None) -> None:
    """Copy the certificates to where the configuration names them; drop copies it does not name.

    HAProxy wants the certificate and its key in one file. Serve restarts HAProxy whenever gateways
    come or go, and it must not stop then: earlier copies stay while the files are unusable. Raises
    InvalidConfiguration where there are none.
    """
    copies = _copied_files(folder, tls)
    for unnamed in {_pem_file(folder), _authority_file(folder)} - copies.keys():
        unnamed.unlink(missing_ok=True)  # else TLS that is turned on again would fall back on it
    if tls is None:
        return
    try:
        check_tls(tls)
        contents = {
            copy: b"\n".join(Path(path).read_bytes() for path in paths)
            for copy, paths in copies.items()
        }
    except (InvalidConfiguration, OSError) as error:
        if not _are_usable(folder, copies):
            raise
        sys.stderr.write(f"specprefill-front: {error}; the certificates stay as they were\n")
        return
    for copy, content in contents.items():
        write_privately(copy, content)


def _copied_files(folder: Path, tls: FrontTls | None) -> dict[Path, tuple[str, ...]]:
    """Return the copies that the configuration names, each with the files that it joins."""
    if tls is None:
        return {}
    copies: dict[Path, tuple[str, ...]] = {_pem_file(folder): (tls.certificate, tls.key)}
    if tls.client_authority is not None:
        copies[_authority_file(folder)] = (tls.client_authority,)
    return copies


def _are_usable(folder: Path, copies: Collection[Path]) -> bool:
    pem, authority = str(_pem_file(folder)), _authority_file(folder)
    try:
        CertificateFiles(pem, pem, str(authority) if authority in copies else None).check()
    except InvalidConfiguration:
        return False
    return True
