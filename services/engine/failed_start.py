"""Finds out why an engine process did not start.

vLLM's engine runs in processes of its own, which write their errors to the output that they
inherit; what the parent raises only points there. A replica's output is a file on its node, so
the error is read back from it and raised where an operator sees it.
"""

from __future__ import annotations

import os
import re
import signal
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from ..core.errors import EngineStartFailed

_OUTPUTS = (1, 2)  # file descriptors: vLLM logs to the first, Python's tracebacks go to the second
_MOST_BYTES = 1 << 20  # of each, from its end
_MOST_CHARACTERS = 2000
# `(EngineCore pid=7) ERROR 11-28 06:30:00 [core.py:1510] ` before what was logged.
_PREFIX = re.compile(r"^(?:\([^()]*pid=\d+\) ?)?(?:[A-Z]+ \d\d-\d\d [\d:]+ \[[^\]]*\] ?)?")
_ERROR = re.compile(r"^(?:[A-Za-z_]\w*\.)*[A-Z]\w*(?:Error|Exception|Model|Configuration)\b: \S")
_SIGNAL = re.compile(r"Failed core proc\(s\): \{[^}]*: -(\d+)")  # an exit code below 0 is a signal
# An error that only points to where the cause stands.
_POINTERS = ("root cause", "EngineDeadError")


@dataclass(frozen=True, slots=True)
class _Output:
    """A file that this process and its children write to, and how long it was."""

    descriptor: int
    length: int

    def read_new(self) -> str:
        """Return what was written since."""
        with open(f"/proc/self/fd/{self.descriptor}", "rb") as file:  # a file position of our own
            end = file.seek(0, os.SEEK_END)
            file.seek(max(self.length, end - _MOST_BYTES))
            return file.read().decode(errors="replace")


@contextmanager
def engine_errors_shown() -> Iterator[None]:
    """Raise EngineStartFailed with the engine processes' own error, where one can be found."""
    outputs = _outputs()
    try:
        yield
    except RuntimeError as error:
        cause = killed_by(str(error))
        if cause is None:
            cause = root_cause("\n".join(output.read_new() for output in outputs))
        if cause is None:  # written to a terminal or a pipe: whoever reads it has the cause
            raise
        raise EngineStartFailed(f"engine: {cause}") from error


def _outputs() -> Sequence[_Output]:
    """Return the regular files among this process's outputs, each once."""
    found: dict[tuple[int, int], _Output] = {}
    for descriptor in _OUTPUTS:
        status = os.fstat(descriptor)
        if stat.S_ISREG(status.st_mode):
            found[status.st_dev, status.st_ino] = _Output(descriptor, status.st_size)
    return tuple(found.values())


def killed_by(message: str) -> str | None:
    """Return which signal ended the engine process, by vLLM's own error; None: it ended itself."""
    found = _SIGNAL.search(message)
    if found is None:
        return None
    name = signal.Signals(int(found[1])).name
    advice = (
        "Linux does this where memory runs out: smaller models, a smaller kv_cache_memory_bytes, "
        "or a container with more memory"
        if name == "SIGKILL"
        else "its log on this node ends with what it did last"
    )
    return f"its process was ended by {name} ({advice})"


def root_cause(text: str) -> str | None:
    """Return the last error in some logs that is more than a pointer to another one."""
    lines = [_PREFIX.sub("", line).rstrip() for line in text.splitlines()]
    errors = [line for line in lines if _ERROR.match(line)]
    causes = [line for line in errors if not any(word in line for word in _POINTERS)]
    return causes[-1][:_MOST_CHARACTERS] if causes else None
