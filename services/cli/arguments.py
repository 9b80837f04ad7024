"""Arguments that several commands take."""

from __future__ import annotations

import argparse
import threading
from contextlib import suppress

from ..lab.reporting import charts
from .exit_codes import Failed

API_KEY_VARIABLE = "SPECPREFILL_API_KEY"


def rate(text: str) -> float:
    """Parse a number above 0 and at most 1. Raises ArgumentTypeError."""
    with suppress(ValueError):
        if 0 < float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a number above 0 and at most 1, not {text!r}")


def natural(text: str) -> int:
    """Parse a whole number that is not negative. Raises ArgumentTypeError."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, not {text!r}")
    return int(text)


def positive(text: str) -> int:
    """Parse a whole number above 0. Raises ArgumentTypeError."""
    if natural(text) == 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return int(text)


def positive_number(text: str) -> float:
    """Parse a number above 0, as seconds that something can wait for. Raises ArgumentTypeError."""
    with suppress(ValueError):
        if 0 < float(text) <= threading.TIMEOUT_MAX:
            return float(text)
    raise argparse.ArgumentTypeError(f"must be a finite number above 0, not {text!r}")


def zero_or_more(text: str) -> float:
    """Parse 0 or a positive number. Raises ArgumentTypeError."""
    with suppress(ValueError):
        if float(text) == 0:
            return 0.0
    return positive_number(text)


def require_charts() -> None:
    """Raise Failed, before any work is done, where the command could not write its report."""
    if not charts.is_installed():
        raise Failed("this command writes charts: install 'specprefill[lab]'")
