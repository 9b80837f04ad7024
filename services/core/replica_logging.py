"""Our log lines, in the log of the replica that writes them."""

from __future__ import annotations

import logging

OURS, SERVES = "specprefill", "ray.serve"


def log_with_serve() -> None:
    """Write our lines where Serve writes this replica's, from the level that Serve's have."""
    serves, ours = logging.getLogger(SERVES), logging.getLogger(OURS)
    ours.setLevel(serves.level or logging.INFO)
    ours.handlers = list(serves.handlers)
    ours.propagate = not ours.handlers
