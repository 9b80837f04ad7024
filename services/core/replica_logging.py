"""Sends this package's log lines to the log of the replica that writes them."""

from __future__ import annotations

import logging

OURS, SERVES = "specprefill", "ray.serve"


def log_with_serve() -> None:
    """Log to the handlers of this replica's Serve log, at Serve's level."""
    serves, ours = logging.getLogger(SERVES), logging.getLogger(OURS)
    ours.setLevel(serves.level or logging.INFO)
    ours.handlers = list(serves.handlers)
    ours.propagate = not ours.handlers
