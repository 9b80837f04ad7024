"""A progress bar on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable

WIDTH = 30


class ProgressBar:
    """A bar with the share done, a remark, and the time that is left; none in a file or a pipe."""

    def __init__(self, total: int, now: Callable[[], float]) -> None:
        self._total = total
        self._now = now
        self._started_s = now()

    def draw(self, done: int, what: str) -> None:
        """Draw the bar again."""
        if not sys.stderr.isatty():
            return
        share = done / self._total
        left_s = (self._now() - self._started_s) / max(share, 1e-9) * (1.0 - share)
        filled = round(share * WIDTH)
        bar = "#" * filled + "." * (WIDTH - filled)
        line = f"\r[{bar}] {done}/{self._total} {what}, {left_s // 60:.0f}:{left_s % 60:02.0f} left"
        print(f"{line:<90}", end="", file=sys.stderr, flush=True)
