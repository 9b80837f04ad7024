"""API keys with names. Keys stay here; logs and metrics see names."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config import ApiKey, default_name, key_digest
from ...core.errors import InvalidConfiguration

KEY_NAME = "specprefill.key_name"  # in the scope of a request with a key
_BEARER = "bearer"


class KeyRing:
    """The keys that a deployment accepts, as digests. An empty ring accepts everybody."""

    def __init__(self, digests: Mapping[str, str]) -> None:
        self._digests = dict(digests)

    def __len__(self) -> int:
        return len(self._digests)

    def name_of(self, headers: Mapping[str, str]) -> str | None:
        """Return the name of the key in `authorization` or `x-api-key`; None for an unknown key.

        Takes as long for a wrong key as for a right one.
        """
        given = key_digest(_presented_key(headers))
        known = [
            name for name, each in self._digests.items() if secrets.compare_digest(given, each)
        ]
        return known[0] if known else None


def read_keys(keys: Sequence[ApiKey | str], environ: Mapping[str, str]) -> KeyRing:
    """Read the keys of `gateway.api_keys` from their sources.

    Raises InvalidConfiguration, which names the field and never shows a key.
    """
    digests: dict[str, str] = {}
    for place, each in enumerate(keys):
        field = f"gateway.api_keys[{place}]"
        entry = ApiKey(name=default_name(place), key=each) if isinstance(each, str) else each
        if entry.name in digests:
            raise InvalidConfiguration(f"{field}.name: {entry.name} is the name of another key")
        digests[entry.name] = entry.sha256 or key_digest(_read_key(entry, field, environ))
    return KeyRing(digests)


def _read_key(entry: ApiKey, field: str, environ: Mapping[str, str]) -> str:
    if entry.key is not None:
        return entry.key
    if entry.env is not None:
        value = environ.get(entry.env, "").strip()
        if not value:
            raise InvalidConfiguration(f"{field}.env: {entry.env} is not set here, or empty")
        return value
    path = str(entry.file)
    try:
        value = Path(path).read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise InvalidConfiguration(f"{field}.file: {path}: {reason}") from error
    if not value:
        raise InvalidConfiguration(f"{field}.file: {path}: is empty")
    return value


def _presented_key(headers: Mapping[str, str]) -> str:
    """Return the key: OpenAI's clients send a bearer token, Anthropic's an `x-api-key`."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    return token.strip() if scheme.lower() == _BEARER else headers.get("x-api-key", "")
