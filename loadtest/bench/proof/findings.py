"""Findings of the parts, written at once, so that the end of a process loses nothing."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROWS, TEXT = "results.jsonl", "results.txt"
_MARKS = {True: "ok  ", False: "FAIL", None: "    "}


@dataclass(frozen=True, slots=True)
class ProofFinding:
    """One line of the results."""

    part: str
    what: str
    ok: bool | None  # None: a measurement, not a check
    at_s: float  # since the part started
    values: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        values = " ".join(f"{name}={_shorten(value)}" for name, value in self.values.items())
        return f"{_MARKS[self.ok]} {self.part}: {self.what}: {values}".rstrip(": ")


class Sheet:
    """The file of one part's findings."""

    def __init__(self, out: Path, part: str) -> None:
        self._out, self._part = out, part
        self._started_s = time.monotonic()

    def check(self, what: str, ok: bool, **values: Any) -> None:
        """Append the outcome of a check."""
        self._append(what, ok, values)

    def measure(self, what: str, **values: Any) -> None:
        """Append a measurement."""
        self._append(what, None, values)

    def skip(self, reason: str) -> None:
        """Append that the part cannot run here."""
        self._append("skipped", None, {"reason": reason})

    def _append(self, what: str, ok: bool | None, values: dict[str, Any]) -> None:
        at_s = round(time.monotonic() - self._started_s, 2)
        finding = ProofFinding(self._part, what, ok, at_s, values)
        with (self._out / ROWS).open("a") as file:
            file.write(json.dumps(asdict(finding), default=str) + "\n")
        with (self._out / TEXT).open("a") as file:
            file.write(f"{finding}\n")
        print(finding, flush=True)


def read(out: Path) -> list[ProofFinding]:
    """Read every finding so far, in order."""
    path = out / ROWS
    if not path.exists():
        return []
    return [ProofFinding(**json.loads(line)) for line in path.read_text().splitlines()]


def _shorten(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
