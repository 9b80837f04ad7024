"""The findings of a deployment check, named by the deployment file's own keys. Pure."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace


class Severity(enum.StrEnum):
    """The severity of a finding."""

    ERROR = "error"  # the deployment would not start
    WARNING = "warning"  # it starts, and serves some requests worse than its file suggests
    NOTE = "note"  # worth knowing, or not to be checked on this machine


@dataclass(frozen=True, slots=True)
class Finding:
    """One sentence about one key."""

    severity: Severity
    key: str
    message: str

    def with_key_prefix(self, prefix: str) -> Finding:
        """Return the finding with its key's place in the file."""
        return replace(self, key=f"{prefix}.{self.key}")

    def line(self) -> str:
        """Return the finding as a person reads it."""
        return f"{self.severity}: {self.key}: {self.message}"


def error(key: str, message: str) -> Finding:
    """Return a finding that keeps the deployment from starting."""
    return Finding(Severity.ERROR, key, message)


def warning(key: str, message: str) -> Finding:
    """Return a finding that the deployment starts with."""
    return Finding(Severity.WARNING, key, message)


def note(key: str, message: str) -> Finding:
    """Return a finding that needs no action."""
    return Finding(Severity.NOTE, key, message)
