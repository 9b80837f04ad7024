"""Arguments that several commands take."""

from __future__ import annotations

import argparse
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


def require_charts() -> None:
    """Raise Failed, before any work is done, where the command could not write its report."""
    if not charts.is_installed():
        raise Failed("this command writes charts: install 'specprefill[lab]'")
