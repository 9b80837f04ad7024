"""The certificates that HAProxy shows to clients: checked, and replaced while it runs.

`specprefill-front` starts `python -m specprefill.deployment.certificates` beside HAProxy. It looks
at the files once a second, gives changed ones to HAProxy through its admin socket, and ends with
HAProxy. It imports the standard library and little else, as it runs on every node.
"""

from __future__ import annotations

import json
import os
import re
import socket
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.errors import InvalidConfiguration

FIELD = "gateway.front.tls"
LOOK_S = 1.0
_SOCKET_TIMEOUT_S = 5.0
_SOCKET = re.compile(r"^\s*stats socket (\S+) .*level admin", re.MULTILINE)


class CommandRefused(Exception):
    """HAProxy refused a command; the message is its answer."""


@dataclass(frozen=True, slots=True)
class CertificateFiles:
    """The operator's PEM files; `client_authority` None: clients need no certificate."""

    certificate: str
    key: str
    client_authority: str | None = None

    def named(self) -> dict[str, str]:
        """Return the paths by the name of their field."""
        return {name: path for name, path in asdict(self).items() if path is not None}

    def check(self) -> None:
        """Raise InvalidConfiguration, naming the field, unless the files can be used."""
        for name, path in self.named().items():
            try:
                Path(path).read_bytes()
            except OSError as error:
                raise InvalidConfiguration(f"{FIELD}.{name}: {path}: {error.strerror}") from error
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        try:
            context.load_cert_chain(self.certificate, self.key, password=lambda: "")
        except (ssl.SSLError, ValueError) as error:
            raise InvalidConfiguration(
                f"{FIELD}.certificate, {FIELD}.key: not a PEM certificate and its "
                f"key without a password: {error}"
            ) from error
        if self.client_authority is None:
            return
        try:
            context.load_verify_locations(self.client_authority)
        except ssl.SSLError as error:
            raise InvalidConfiguration(
                f"{FIELD}.client_authority: not a PEM certificate: {error}"
            ) from error

    def pem(self) -> bytes:
        """Return the certificate and its key in one text, as HAProxy wants them."""
        return b"\n".join(Path(path).read_bytes() for path in (self.certificate, self.key))


def write_privately(path: Path, content: bytes) -> None:
    """Replace a file at once by one that only its owner may read. Raises OSError."""
    descriptor, new = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(new, path)


class AdminSocket:
    """HAProxy's commands for certificates."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def replace(self, kind: str, name: str, pem: bytes) -> None:
        """Replace the `cert` or `ca-file` that the configuration calls `name`.

        Raises OSError while HAProxy does not listen, CommandRefused.
        """
        lines = b"\n".join(line for line in pem.splitlines() if line.strip())  # a blank ends it
        self._command(b"set ssl %s %s <<\n%s\n\n" % (kind.encode(), name.encode(), lines))
        answer = self._command(b"commit ssl %s %s\n" % (kind.encode(), name.encode()))
        if "Success" not in answer:
            raise CommandRefused(answer.strip())

    def _command(self, command: bytes) -> str:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_SOCKET_TIMEOUT_S)
            connection.connect(str(self._path))
            connection.sendall(command)
            connection.shutdown(socket.SHUT_WR)
            with connection.makefile("rb") as answer:
                return answer.read().decode()


@dataclass(frozen=True, slots=True)
class WatchOrder:
    """What one watch needs: the operator's files, HAProxy's copies of them, and its socket."""

    files: CertificateFiles
    pem_copy: str  # certificate and key, as HAProxy's configuration names them
    authority_copy: str  # exists where `files` has a client_authority
    socket: str


class CertificateWatch:
    """Gives HAProxy the files whenever they have changed and fit each other.

    The copies follow: HAProxy starts again with them while the files are unusable.
    """

    def __init__(
        self,
        order: WatchOrder,
        replace: Callable[[str, str, bytes], None],
        log: Callable[[str], None],
    ) -> None:
        """`replace` is AdminSocket's; the copies hold what HAProxy has read."""
        self._files = order.files
        self._replace = replace
        self._log = log
        sources = {"ca-file": order.authority_copy, "cert": order.pem_copy}
        if order.files.client_authority is None:
            del sources["ca-file"]
        self._names = sources
        self._known = {kind: Path(copy).read_bytes() for kind, copy in sources.items()}
        self._complaint = ""

    def look(self) -> None:
        """Compare the files with what HAProxy has, and replace what differs."""
        try:
            self._replace_changed()
        except (InvalidConfiguration, CommandRefused, OSError) as error:
            if str(error) != self._complaint:
                self._log(f"certificates stay as they are: {error}")
            self._complaint = str(error)
        else:
            self._complaint = ""

    def _replace_changed(self) -> None:
        now = self._read()
        changed = [kind for kind in self._known if now[kind] != self._known[kind]]
        if not changed:
            return
        self._files.check()
        for kind in changed:
            self._replace(kind, self._names[kind], now[kind])
            self._known[kind] = now[kind]
            write_privately(Path(self._names[kind]), now[kind])
        self._log("certificates replaced; new connections use them")

    def _read(self) -> dict[str, bytes]:
        authority = self._files.client_authority
        trusted = {} if authority is None else {"ca-file": Path(authority).read_bytes()}
        return {"cert": self._files.pem(), **trusted}


def admin_socket(haproxy_config: str) -> str:
    """Return the path of the admin socket. Raises InvalidConfiguration if there is none."""
    found = _SOCKET.search(haproxy_config)
    if found is None:
        raise InvalidConfiguration(f"{FIELD}: HAProxy's configuration has no admin socket")
    return found[1]


def start_watch(order: WatchOrder) -> None:
    """Start the watch in a process of its own; it ends with this one, whatever it runs by then."""
    subprocess.Popen(
        [sys.executable, "-m", __name__, str(os.getpid()), json.dumps(asdict(order))],
        stdin=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for HAProxy
    )


def main() -> None:
    """Watch the files until the process that is named first ends."""
    parent, given = int(sys.argv[1]), json.loads(sys.argv[2])
    order = WatchOrder(**{**given, "files": CertificateFiles(**given["files"])})

    def log(line: str) -> None:
        sys.stderr.write(f"specprefill-front: {line}\n")

    watch = CertificateWatch(order, AdminSocket(Path(order.socket)).replace, log)
    while os.getppid() == parent:
        watch.look()
        time.sleep(LOOK_S)


if __name__ == "__main__":
    main()
