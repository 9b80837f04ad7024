"""What the service's processes hold and write, seen from outside."""

from __future__ import annotations

import re
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import psutil

TRACEBACK = "Traceback (most recent call last)"
_SESSION = re.compile(r"/tmp/ray/session_[0-9][\w-]+")
_SETTLED_S = 30.0
SPARE_DESCRIPTORS = 8  # of one process: a pooled connection here and there
SPARE_BYTES = 64 << 20  # of one process: allocators keep what they have had
SPARE_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Holding:
    """What one process holds."""

    name: str
    resident_bytes: int
    descriptors: int


@dataclass(slots=True)
class Watch:
    """The processes below the service's own, and the log files of their Ray session.

    With a `folder` of logs, the process itself is watched, too: it has no session.
    """

    pid: int
    folder: Path | None = None
    _lengths: dict[Path, int] = field(default_factory=dict)

    def holdings(self) -> dict[int, Holding]:
        """Return what each process holds now, by process id."""
        found = {}
        service = psutil.Process(self.pid)
        own = [] if self.folder is None else [service]
        for process in [*own, *service.children(recursive=True)]:
            try:
                name = _name(process)
                found[process.pid] = Holding(name, process.memory_info().rss, process.num_fds())
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def grown(self, before: dict[int, Holding]) -> list[str]:
        """Return which processes hold more than before, once they have had time to settle."""
        give_up_s = time.monotonic() + _SETTLED_S
        while True:
            faults = self._grown_now(before)
            if not faults or time.monotonic() > give_up_s:
                return faults
            time.sleep(1.0)

    def _grown_now(self, before: dict[int, Holding]) -> list[str]:
        now = self.holdings()
        faults = [f"{held.name} ({pid}) died" for pid, held in before.items() if pid not in now]
        for pid, held in before.items():
            if pid not in now:
                continue
            after = now[pid]
            if after.descriptors > held.descriptors + SPARE_DESCRIPTORS:
                faults.append(f"{held.name}: {held.descriptors} -> {after.descriptors} descriptors")
            most = held.resident_bytes * (1 + SPARE_SHARE) + SPARE_BYTES
            if after.resident_bytes > most:
                mib = (held.resident_bytes >> 20, after.resident_bytes >> 20)
                faults.append(f"{held.name}: {mib[0]} -> {mib[1]} MiB")
        return faults

    def mark_logs(self) -> None:
        """Forget what the logs hold now."""
        self._lengths = {path: path.stat().st_size for path in self._logs()}

    def tracebacks(self) -> list[str]:
        """Return each traceback written since: the file, and the traceback's last lines."""
        return [
            f"{path.name}: {text}"
            for path in self._logs()
            for text in _tracebacks(self._added(path))
        ]

    def _added(self, path: Path) -> str:
        with path.open("rb") as file:
            file.seek(self._lengths.get(path, 0))
            return file.read().decode(errors="replace")

    def _logs(self) -> list[Path]:
        folder = self._session() / "logs" if self.folder is None else self.folder
        files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        return sorted(path for path in files if path.suffix in {".log", ".err", ".out"})

    def _session(self) -> Path:
        for process in psutil.Process(self.pid).children(recursive=True):
            found = _SESSION.search(" ".join(process.cmdline()))
            if found:
                return Path(found.group())
        raise RuntimeError(f"process {self.pid} has no Ray session below it")


def _name(process: psutil.Process) -> str:
    command = process.cmdline()
    return command[0].split()[0] if command and "::" in command[0] else process.name()


def _tracebacks(text: str) -> list[str]:
    """Return the lines behind each traceback's head, as many as show its error."""
    pieces = text.split(TRACEBACK)[1:]
    return [" | ".join(line.strip() for line in piece.splitlines()[:40])[-600:] for piece in pieces]


def totals(holdings: dict[int, Holding]) -> str:
    """Return the sums over all processes, and the number of each kind."""
    kinds = Counter(held.name for held in holdings.values())
    mib = sum(held.resident_bytes for held in holdings.values()) >> 20
    descriptors = sum(held.descriptors for held in holdings.values())
    return f"{len(holdings)} processes, {mib} MiB, {descriptors} descriptors ({dict(kinds)})"
