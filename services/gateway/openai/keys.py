"""API keys with names. Keys stay here; logs and metrics see names.

Files are read again when they change, so that a key is replaced without a restart. Environment
variables and the deployment file are read once.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from ...config import ApiKey, default_name, key_digest
from ...core.errors import InvalidConfiguration

logger = logging.getLogger(__name__)

KEY_NAME = "specprefill.key_name"  # in the scope of a request with a key
RELOAD_S = 1.0  # between two looks at a file
_BEARER = "bearer"
_Stamp = tuple[int, int, int]  # of a file: inode, size, time of change


class KeyFile:
    """A file with a client's key: one a line, several while one replaces another."""

    def __init__(self, name: str, path: Path) -> None:
        self.name = name
        self.digests: frozenset[str] = frozenset()
        self._path = path
        self._stamp: _Stamp | None = None
        self._complaint = ""

    def read(self) -> None:
        """Read the file. Raises OSError, or ValueError if it holds no key."""
        stamp = _stamp(self._path)  # first, so that a change meanwhile is seen next time
        self.digests = _read_digests(self._path)
        self._stamp = stamp

    def reload(self) -> None:
        """Read the file if it has changed. Log the outcome, by the key's name.

        A removed file revokes its keys. One that is empty or cannot be read changes nothing: it
        may be half-written.
        """
        before = self.digests
        try:
            stamp = _stamp(self._path)
            if stamp == self._stamp:
                return
            if stamp is None:
                self.digests, self._stamp = frozenset(), None
            else:
                self.read()
        except (OSError, ValueError) as error:
            self._complain_once(str(error))
            return
        self._complaint = ""
        if self.digests != before:
            logger.info("api key: name=%s changed: keys=%d", self.name, len(self.digests))

    def _complain_once(self, complaint: str) -> None:
        if complaint != self._complaint:
            logger.warning("api key: name=%s kept as it was: %s", self.name, complaint)
        self._complaint = complaint


class KeyRing:
    """The keys that a deployment accepts, as digests. An empty ring accepts everybody."""

    def __init__(
        self,
        digests: Mapping[str, str],
        files: Sequence[KeyFile] = (),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._digests = dict(digests)
        self._files = tuple(files)
        self._now = now
        self._looked_s = now()

    def __len__(self) -> int:
        return len(self._digests) + len(self._files)

    def name_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the name of the key in `authorization` or `x-api-key`; None for an unknown key.

        Takes as long for a wrong key as for a right one.
        """
        self._reload_files()
        given = key_digest(_presented_key(headers))
        fixed = self._digests.items()
        listed = ((file.name, digest) for file in self._files for digest in file.digests)
        known = [
            name for name, each in (*fixed, *listed) if secrets.compare_digest(given, each)
        ]  # fmt: skip
        return known[0] if known else None

    def _reload_files(self) -> None:
        if self._files and self._now() - self._looked_s >= RELOAD_S:
            self._looked_s = self._now()
            for file in self._files:
                file.reload()


def read_keys(keys: Sequence[ApiKey | str], environ: Mapping[str, str]) -> KeyRing:
    """Read the keys of `gateway.api_keys` from their sources.

    Raises InvalidConfiguration, which names the field and never shows a key.
    """
    names: set[str] = set()
    digests: dict[str, str] = {}
    files: list[KeyFile] = []
    for place, each in enumerate(keys):
        field = f"gateway.api_keys[{place}]"
        entry = ApiKey(name=default_name(place), key=each) if isinstance(each, str) else each
        if entry.name in names:
            raise InvalidConfiguration(f"{field}.name: {entry.name} is the name of another key")
        names.add(entry.name)
        if entry.file is not None:
            files.append(_open_file(entry.name, entry.file, field))
        else:
            digests[entry.name] = entry.sha256 or key_digest(_read_key(entry, field, environ))
    return KeyRing(digests, files)


def _read_key(entry: ApiKey, field: str, environ: Mapping[str, str]) -> str:
    if entry.key is not None:
        return entry.key
    value = environ.get(str(entry.env), "").strip()
    if not value:
        raise InvalidConfiguration(f"{field}.env: {entry.env} is not set here, or empty")
    return value


def _open_file(name: str, path: str, field: str) -> KeyFile:
    file = KeyFile(name, Path(path))
    try:
        file.read()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InvalidConfiguration(f"{field}.file: {path}: {reason}") from error
    return file


def _read_digests(path: Path) -> frozenset[str]:
    """Return the digests of the file's keys. Raises OSError, or ValueError without any key."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:  # its own message would show what the file holds
        raise ValueError("not UTF-8") from error
    keys = [line.strip() for line in lines if line.strip()]
    if not keys:
        raise ValueError("is empty")
    return frozenset(map(key_digest, keys))


def _stamp(path: Path) -> _Stamp | None:
    """Return a value that differs once the file has changed; None: there is no such file."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _presented_key(headers: Mapping[str, str]) -> str:
    """Return the key: OpenAI's clients send a bearer token, Anthropic's an `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == _BEARER else headers.get("x-api-key", "")
